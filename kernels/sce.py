"""SCE on the GPU: exact selection by variance and the merge, over blocks of a tensor of any size.

Three kernels read a block of the base and of J targets. `_tally` counts keys above a bracket and sorts those inside
into 2^15 bins of their bits; a few passes narrow the bracket to the exact threshold. `_energies` sums δ² over what was
selected, per target. `_combine` recomputes key and sign, and merges. All arithmetic is in float64 without fused
multiply-adds, term by term as csrc/merge has it, so that both select the same elements. Memory is two blocks, whatever
the tensor's size; a tensor of one block is fetched once. The definition in NumPy is fusechat/merge/reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
BIN_BITS = 15
INFINITY_BITS = 0x7FF0_0000_0000_0000
WARPS = 4

Fetch = Callable[[int, int], tuple[Tensor, Tensor]]
"""(begin, n) → base [n] and targets [J, n] on the device, the targets in one dtype."""


@triton.jit
def _delta(base, TARGETS, stride, j, at, inside):
    """δ_j rounded to fp32, as the CPU engine takes it, in float64."""
    target = tl.load(TARGETS + j * stride + at, mask=inside, other=0.0).to(tl.float32)
    return (target - base).to(tl.float64)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _all_finite(BASE, TARGETS, stride, at, inside, J: tl.constexpr):
    base = tl.load(BASE + at, mask=inside, other=0.0).to(tl.float32)
    fine = _finite(base)
    for j in tl.static_range(J):
        fine = fine & _finite(_delta(base, TARGETS, stride, j, at, inside))
    return base, fine & inside


@triton.jit
def _keys(base, TARGETS, stride, at, fine, J: tl.constexpr):
    """J² · population variance: J Σ (δ_j − δ_0)² − (Σ (δ_j − δ_0))²."""
    first = _delta(base, TARGETS, stride, 0, at, fine)
    total = tl.zeros_like(first)
    squares = tl.zeros_like(first)
    for j in tl.static_range(1, J):
        difference = _delta(base, TARGETS, stride, j, at, fine) - first
        total += difference
        squares += difference * difference
    key = J * squares - total * total
    return tl.where(fine & (key > 0), key, 0.0)


# Numbers that differ from pass to pass have one type, and no code of their own for 1 and multiples of 16.
@triton.jit(do_not_specialize=["low", "high", "shift"])
def _tally(
    BASE, TARGETS, HISTOGRAM, COUNTS, stride, n, low: tl.int64, high: tl.int64, shift, J: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """COUNTS [programs, 4]: not finite, key > 0, bits >= high, and bits in [low, high), which are also binned."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    base, fine = _all_finite(BASE, TARGETS, stride, at, here, J)
    key = _keys(base, TARGETS, stride, at, fine, J)
    bits = key.to(tl.int64, bitcast=True)
    inside = here & (bits >= low) & (bits < high)
    tl.atomic_add(HISTOGRAM + ((bits - low) >> shift), 1, mask=inside)
    tl.store(COUNTS + pid * 4, tl.sum((here & (fine == 0)).to(tl.int32), 0))
    tl.store(COUNTS + pid * 4 + 1, tl.sum((key > 0).to(tl.int32), 0))
    tl.store(COUNTS + pid * 4 + 2, tl.sum((here & (bits >= high)).to(tl.int32), 0))
    tl.store(COUNTS + pid * 4 + 3, tl.sum(inside.to(tl.int32), 0))


@triton.jit
def _selected(base, TARGETS, stride, at, begin, fine, threshold, tie_stop, J: tl.constexpr):
    bits = _keys(base, TARGETS, stride, at, fine, J).to(tl.int64, bitcast=True)
    return fine & ((bits > threshold) | ((bits == threshold) & (begin + at < tie_stop)))


@triton.jit(do_not_specialize=["begin", "threshold", "tie_stop"])
def _energies(
    BASE, TARGETS, SUMS, stride, n, begin: tl.int64, threshold: tl.int64, tie_stop: tl.int64, J: tl.constexpr,
    SELECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SUMS [programs, J]: Σ δ² over what was selected."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base, fine = _all_finite(BASE, TARGETS, stride, at, at < n, J)
    chosen = fine
    if SELECT:
        chosen = _selected(base, TARGETS, stride, at, begin, fine, threshold, tie_stop, J)
    for j in tl.static_range(J):
        delta = _delta(base, TARGETS, stride, j, at, chosen)
        tl.store(SUMS + pid * J + j, tl.sum(tl.where(chosen, delta * delta, 0.0), 0))


@triton.jit(do_not_specialize=["begin", "threshold", "tie_stop"])
def _combine(
    BASE, TARGETS, WEIGHTS, OUT, SUMS, stride, n, begin: tl.int64, threshold: tl.int64, tie_stop: tl.int64, least_share,
    J: tl.constexpr, SELECT: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [n]: the merged values in fp32. SUMS [programs, 3 + 2J]: Σ update², elements moved, elements where a target
    was dropped for its sign, then per target Σ δ² and Σ δ² over what reached the sum."""
    pid = tl.program_id(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    base, fine = _all_finite(BASE, TARGETS, stride, at, here, J)
    chosen = fine
    if SELECT:
        chosen = _selected(base, TARGETS, stride, at, begin, fine, threshold, tie_stop, J)
    vote = tl.zeros([BLOCK], tl.float64)
    for j in tl.static_range(J):
        vote += _delta(base, TARGETS, stride, j, at, chosen)
    negative = vote < 0  # a sum of zero elects plus
    total = tl.zeros([BLOCK], tl.float64)
    share = tl.zeros([BLOCK], tl.float64)
    agreed = tl.zeros([BLOCK], tl.float64)
    width: tl.constexpr = 3 + 2 * J
    for j in tl.static_range(J):
        weight = tl.load(WEIGHTS + j)
        delta = _delta(base, TARGETS, stride, j, at, fine)
        keep = chosen & tl.where(negative, delta < 0, delta > 0)
        kept = tl.where(keep, delta, 0.0)
        agreed += kept
        total += weight * kept
        share += tl.where(keep, weight, 0.0)
        tl.store(SUMS + pid * width + 3 + j, tl.sum(tl.where(fine, delta * delta, 0.0), 0))
        tl.store(SUMS + pid * width + 3 + J + j, tl.sum(kept * kept, 0))
    if DIVIDE:
        bounded = tl.where(share < least_share, least_share, share)
        total = total / tl.where(bounded == 0, 1.0, bounded)
    vote = tl.where(chosen, vote, 0.0)
    tl.store(SUMS + pid * width, tl.sum(total * total, 0))
    tl.store(SUMS + pid * width + 1, tl.sum((total != 0).to(tl.float64), 0))
    tl.store(SUMS + pid * width + 2, tl.sum((agreed != vote).to(tl.float64), 0))
    tl.store(OUT + at, (base.to(tl.float64) + total).to(tl.float32), mask=here)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One tensor: its size, its number of targets, how to fetch a block, and how many items a block has."""

    n: int
    n_targets: int
    fetch: Fetch
    block_items: int
    _only: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield (begin, n, base, targets); what fits one block is fetched once."""
        if self._only:
            yield 0, self.n, *self._only[0]
            return
        for begin in range(0, self.n, self.block_items):
            count = min(self.block_items, self.n - begin)
            base, targets = self.fetch(begin, count)
            if count == self.n:
                self._only.append((base, targets))
            yield begin, count, base, targets


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Selected are keys whose bits exceed `bits`, and those equal to it up to the flat index `tie_stop`."""

    k: int
    n_nonzero: int
    bits: int
    tie_stop: int


class NonFiniteError(ValueError):
    """An input holds NaN or infinity, and that is not allowed."""


def _programs(n: int) -> int:
    return triton.cdiv(n, BLOCK)


def _count(tensor: Blocks, low: int, high: int, shift: int) -> tuple[Tensor, Tensor]:
    """Return the histogram, int64[bins], and the counts, int64[all programs, 4], of one pass."""
    histogram = torch.zeros(1)
    counts = []
    for begin, n, base, targets in tensor.blocks():
        if begin == 0:
            histogram = torch.zeros(1 << BIN_BITS, dtype=torch.int64, device=base.device)
        here = torch.empty(_programs(n), 4, dtype=torch.int32, device=base.device)
        with torch.cuda.device_of(base):
            _tally[(_programs(n),)](
                base, targets, histogram, here, targets.stride(0), n, low, high, shift, J=tensor.n_targets, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        counts.append(here.cpu())
    return histogram.cpu(), torch.cat(counts).to(torch.int64)


def find_threshold(tensor: Blocks, quota: Callable[[int], int], *, allow_nonfinite: bool = False) -> Threshold:
    """Return the exact threshold of the quota(n_nonzero) largest variances; ties go to the lowest index.

    `block_items` must be a multiple of BLOCK where there are several blocks. Raises NonFiniteError.
    """
    low, high, n_above = 0, INFINITY_BITS, 0
    while True:
        shift = max(0, (high - low - 1).bit_length() - BIN_BITS)
        histogram, counts = _count(tensor, low, high, shift)
        not_finite, n_nonzero, n_above, _ = (int(c) for c in counts.sum(0))
        if not_finite and not allow_nonfinite:
            raise NonFiniteError
        k = quota(n_nonzero)
        if k == 0:
            return Threshold(k=0, n_nonzero=n_nonzero, bits=INFINITY_BITS, tie_stop=0)
        needed = k - n_above
        if high - low == 1:
            ties = counts[:, 3].cumsum(0)
            program = int(torch.searchsorted(ties, needed))
            before = int(ties[program - 1]) if program else 0
            stop = _nth_tie(tensor, program * BLOCK, low, needed - before)
            return Threshold(k=k, n_nonzero=n_nonzero, bits=low, tie_stop=stop)
        from_top = histogram.flip(0).cumsum(0)
        bin_ = histogram.numel() - 1 - int(torch.searchsorted(from_top, needed))
        low, high = low + (bin_ << shift), min(high, low + ((bin_ + 1) << shift))
        if int(from_top[histogram.numel() - 1 - bin_]) == needed:  # the whole bin is selected
            return Threshold(k=k, n_nonzero=n_nonzero, bits=low - 1, tie_stop=0)


def _nth_tie(tensor: Blocks, start: int, bits: int, nth: int) -> int:
    """Return one past the flat index of the nth key equal to `bits` from item `start`, a program's first, on."""
    base, targets = tensor.fetch(start, min(BLOCK, tensor.n - start))
    deltas = (targets.float() - base.float()).double()
    fine = base.float().isfinite() & deltas.isfinite().all(0)
    differences = deltas - deltas[0]
    squares, total = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for difference in differences[1:]:
        total = total + difference
        squares = squares + difference * difference
    keys = torch.where(fine, tensor.n_targets * squares - total * total, 0.0).clamp(min=0)
    found = (keys.view(torch.int64) == bits).nonzero().flatten()
    return start + int(found[nth - 1]) + 1


def energies(tensor: Blocks, threshold: Threshold | None) -> Tensor:
    """Return Σ δ² per target, float64[J], over what was selected (None: over everything)."""
    sums = []
    for begin, n, base, targets in tensor.blocks():
        here = torch.empty(_programs(n), tensor.n_targets, dtype=torch.float64, device=base.device)
        with torch.cuda.device_of(base):
            _energies[(_programs(n),)](
                base, targets, here, targets.stride(0), n, begin, threshold.bits if threshold else 0,
                threshold.tie_stop if threshold else 0, J=tensor.n_targets, SELECT=threshold is not None, BLOCK=BLOCK,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        sums.append(here.sum(0).cpu())
    return torch.stack(sums).sum(0)


def combine(
    tensor: Blocks,
    weights: Tensor,
    threshold: Threshold | None,
    write: Callable[[int, Tensor, Tensor], None],
    *,
    divide: bool,
    least_share: float = float("-inf"),
) -> Tensor:
    """Merge block by block; `write(begin, merged float32[n], base [n])` takes each.

    `threshold` None merges all deltas. Returns float64[3 + 2J]: Σ update², elements moved, sign conflicts, then per
    target Σ δ² and Σ δ² over what reached the sum.
    """
    sums = []
    for begin, n, base, targets in tensor.blocks():
        merged = torch.empty(n, dtype=torch.float32, device=base.device)
        here = torch.empty(_programs(n), 3 + 2 * tensor.n_targets, dtype=torch.float64, device=base.device)
        with torch.cuda.device_of(base):
            _combine[(_programs(n),)](
                base, targets, weights.to(base.device), merged, here, targets.stride(0), n, begin,
                threshold.bits if threshold else 0, threshold.tie_stop if threshold else 0, least_share,
                J=tensor.n_targets, SELECT=threshold is not None, DIVIDE=divide, BLOCK=BLOCK, num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
        sums.append(here.sum(0).cpu())
        write(begin, merged, base)
    return torch.stack(sums).sum(0)
