"""The compiled engine's `merge_tensor` for SCE on a GPU: the same call, the same report, over kernels/sce.py.

What is selected and elected is the CPU engine's, bit for bit; η differs from it by the order of a float64 sum. A
reported threshold may be a bound just below the smallest selected variance. The report's energies are of every element,
where the CPU engine measures one tile in sixteen.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

import torch

from fusechat.errors import ConfigError, FusechatError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK_BYTES = 1 << 28


def require_gpu() -> None:
    """Raise ConfigError where no CUDA device can be used."""
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device here that torch can use; leave the option out")


def merge_tensor(
    sources: Sequence[tuple[Any, ...]],
    n: int,
    *,
    quota_share: tuple[int, int, bool] | None = None,
    mask_weights_only: bool,
    uniform_below: float,
    divide: str,
    allow_nonfinite: bool,
    out_dtype: str,
    out_fd: int,
    out_offset: int,
    device: str = "cuda",
    block_bytes: int = BLOCK_BYTES,
    **_: Any,
) -> dict[str, Any]:
    """Merge one tensor of n items from open files into an open file, as `_native.merge_tensor` does.

    `sources` are (fd, byte offset, dtype, items there, None), the base first; `block_bytes` bounds each of the buffers
    on the device. Raises FusechatError when a file is shorter than its header said.
    """
    from fusechat.kernels import sce

    n_targets = len(sources) - 1
    items = max(sce.BLOCK, block_bytes // (4 * len(sources)) // sce.BLOCK * sce.BLOCK)
    blocks = sce.Blocks(
        n=n, n_targets=n_targets, fetch=lambda begin, count: _fetch(sources, begin, count, device), block_items=items
    )
    report: dict[str, Any] = {"nonfinite": [(0, -1)] * len(sources), "n_overflow": 0}
    if n == 0:
        zeros = [0.0] * n_targets
        return report | _numbers(torch.zeros(3 + 2 * n_targets), n_targets) | {
            "selections": [], "weights": [1 / n_targets] * n_targets, "energy": zeros, "kept_energy": zeros,
        }  # fmt: skip
    try:
        found = sce.find_threshold(blocks, _quota(quota_share), allow_nonfinite=allow_nonfinite)
    except sce.NonFiniteError:
        return report | {"nonfinite": _nonfinite(blocks, len(sources))}
    selection = found if quota_share is not None else None
    energy = sce.energies(blocks, selection).tolist()
    total = sum(energy)
    uniform = total == 0 or total / n < uniform_below
    weights = [1 / n_targets if uniform else e / total for e in energy]

    def write(begin: int, merged: torch.Tensor, base: torch.Tensor) -> None:
        rounded = merged.to(_DTYPES[out_dtype])
        report["n_overflow"] += int((~rounded.isfinite() & base.isfinite()).sum())
        _write(out_fd, rounded, out_offset + begin * rounded.element_size())

    sums = sce.combine(
        blocks, torch.tensor(weights, dtype=torch.float64), None if mask_weights_only else selection, write,
        divide=divide != "none", least_share=1e-6 if divide == "clamped" else float("-inf"),
    )  # fmt: skip
    facts = {"k": n, "n_nonzero": 0, "threshold": -1.0, "tie_stop": 0, "energy": energy}
    if selection is not None:
        (threshold,) = struct.unpack("<d", selection.bits.to_bytes(8, "little"))
        facts |= {"k": selection.k, "n_nonzero": selection.n_nonzero, "threshold": threshold}
        facts |= {"tie_stop": selection.tie_stop}
    return report | _numbers(sums, n_targets) | {"selections": [facts], "weights": weights}


def _quota(share: tuple[int, int, bool] | None) -> Any:
    numerator, denominator, in_fp32 = share or (0, 1, False)

    def resolve(n_nonzero: int) -> int:
        if not in_fp32:
            return n_nonzero * numerator // denominator
        product = torch.tensor(float(n_nonzero), dtype=torch.float32) * torch.tensor(
            numerator / denominator, dtype=torch.float32
        )
        return min(n_nonzero, int(product))

    return resolve


def _numbers(sums: torch.Tensor, n_targets: int) -> dict[str, Any]:
    update, touched, conflicts, *rest = sums.tolist()
    return {
        "update_energy": update, "n_touched": int(touched), "n_conflicts": int(conflicts),
        "energy": rest[:n_targets], "kept_energy": rest[n_targets:],
    }  # fmt: skip


def _fetch(sources: Sequence[tuple[Any, ...]], begin: int, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    base = _read(sources[0], begin, n).to(device)
    targets = [_read(source, begin, n).to(device) for source in sources[1:]]
    if len({target.dtype for target in targets}) > 1 or any(target.numel() < n for target in targets):
        # Rows a target lacks count as unchanged.
        targets = [torch.cat([t.float(), base[t.numel() :].float()]) for t in targets]
    return base, torch.stack(targets)


def _read(source: tuple[Any, ...], begin: int, n: int) -> torch.Tensor:
    fd, offset, dtype, n_valid, _ = source
    items = torch.empty(max(0, min(n, n_valid - begin)), dtype=_DTYPES[dtype])
    raw = memoryview(items.view(torch.uint8).numpy().data)
    done = 0
    while done < len(raw):
        got = os.preadv(fd, [raw[done:]], offset + begin * items.element_size() + done)
        if got == 0:
            raise FusechatError("an input became shorter while it was read")
        done += got
    return items


def _write(fd: int, items: torch.Tensor, offset: int) -> None:
    raw = memoryview(items.cpu().view(torch.uint8).numpy().data)
    done = 0
    while done < len(raw):
        done += os.pwrite(fd, raw[done:], offset + done)


def _nonfinite(blocks: Any, n_sources: int) -> list[tuple[int, int]]:
    """Count what is not finite per source, and where the first is; a base that is not finite accuses no target."""
    found = [(0, -1)] * n_sources
    for begin, _, base, targets in blocks.blocks():
        fine = base.float().isfinite()
        masks = [~fine, *(fine & ~(target.float() - base.float()).isfinite() for target in targets)]
        for s, mask in enumerate(masks):
            at = mask.nonzero().flatten()
            if len(at):
                count, first = found[s]
                found[s] = (count + len(at), first if first >= 0 else begin + int(at[0]))
    return found
