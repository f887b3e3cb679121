"""The k largest logits of every row and their logsumexp, from a chunk of logits in one read and k groups more.

Equal to

    lse = logits.float().logsumexp(1); top, ids = logits.topk(k); logprobs = top − lse

One program a row. The pass that sums keeps the maximum of every group of 128 logits; then k times the group with the
highest maximum gives its next logit. Logits of equal size come in the order of their ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusechat.kernels.softcap import capped

BLOCK, WARPS = 4096, 8
GROUP = tl.constexpr(128)
LOWEST = tl.constexpr(-3.0e38)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _read_block(u, n, top, total, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Add the first n logits of a block to the running maximum and sum, and return the maximum of each group."""
    z, _ = capped(u.to(tl.float32), cap, CAP)
    z = tl.where(tl.arange(0, BLOCK) < n, z, MINUS_INFINITY)
    highest = tl.max(tl.reshape(z, [BLOCK // GROUP, GROUP]), 1)
    new_top = tl.maximum(top, tl.max(highest, 0))
    total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
    return new_top, total, highest


@triton.jit
def _topk_logprob(
    Z, LABELS, MAXIMA, IDS, LOGPROBS, LSE, LABEL_LOGPROB, z_stride, V, N_GROUPS, K, cap,
    CAP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * z_stride
    maxima_row = MAXIMA + row * N_GROUPS
    columns = tl.arange(0, BLOCK)
    groups = tl.arange(0, BLOCK // GROUP)
    n_whole = V // BLOCK
    top = LOWEST
    total = 0.0
    for block in range(0, n_whole):
        u = tl.load(z_row + block * BLOCK + columns)
        top, total, highest = _read_block(u, BLOCK, top, total, cap, CAP, BLOCK)
        tl.store(maxima_row + block * (BLOCK // GROUP) + groups, highest)
    if n_whole * BLOCK < V:
        last = n_whole * BLOCK + columns
        u = tl.load(z_row + last, mask=last < V, other=MINUS_INFINITY)
        top, total, highest = _read_block(u, V - n_whole * BLOCK, top, total, cap, CAP, BLOCK)
        group = n_whole * (BLOCK // GROUP) + groups
        tl.store(maxima_row + group, highest, mask=group < N_GROUPS)
    lse = top + tl.log(total)
    tl.store(LSE + row, lse)
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < V)
    z_label, _ = capped(tl.load(z_row + label, mask=known, other=0.0).to(tl.float32), cap, CAP)
    tl.store(LABEL_LOGPROB + row, tl.where(known, z_label - lse, float("nan")))

    tl.debug_barrier()
    all_groups = tl.arange(0, GROUPS)
    highest = tl.load(maxima_row + all_groups, mask=all_groups < N_GROUPS, other=MINUS_INFINITY)
    # NaN would end the search: it counts as the lowest here, while lse and with it every result is NaN.
    highest = tl.where(highest == highest, highest, MINUS_INFINITY)  # noqa: PLR0124
    # −∞ may be among the k largest, what lies beyond the row may not.
    highest = tl.where((highest == MINUS_INFINITY) & (all_groups < N_GROUPS), LOWEST, highest)
    last_z = float("inf")
    last_id = -1
    members = tl.arange(0, GROUP)
    for i in range(0, K):
        group = tl.argmax(highest, 0)
        ids = group * GROUP + members
        u = tl.load(z_row + ids, mask=ids < V, other=MINUS_INFINITY)
        z, _ = capped(u.to(tl.float32), cap, CAP)
        z = tl.where(z == z, tl.maximum(z, LOWEST), LOWEST)  # noqa: PLR0124
        left = (ids < V) & ((z < last_z) | ((z == last_z) & (ids > last_id)))
        z = tl.where(left, z, MINUS_INFINITY)
        found = tl.max(z, 0)
        found_id = group * GROUP + tl.argmax(z, 0)
        next_z = tl.max(tl.where(ids == found_id, MINUS_INFINITY, z), 0)
        highest = tl.where(all_groups == group, next_z, highest)
        tl.store(IDS + row * K + i, found_id)
        tl.store(LOGPROBS + row * K + i, tl.where(found == LOWEST, MINUS_INFINITY, found) - lse)
        last_z = found
        last_id = found_id


def topk_logprob_rows(logits: Tensor, k: int, labels: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids int32[C, k], logprobs float32[C, k], lse float32[C] and the labels' logprob float32[C], NaN where the
    label is negative; logits [C, V] may have rows apart, their elements not."""
    n_rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("rows of logits must be contiguous")
    ids = torch.empty(n_rows, k, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(n_rows, k, dtype=torch.float32, device=logits.device)
    lse, label_logprob = (torch.empty(n_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if n_rows == 0:
        return ids, logprobs, lse, label_logprob
    n_groups = triton.cdiv(vocabulary, GROUP.value)
    maxima = torch.empty(n_rows, n_groups, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _topk_logprob[(n_rows,)](
            logits, labels, maxima, ids, logprobs, lse, label_logprob, logits.stride(0), vocabulary, n_groups, k,
            softcap or 1.0, CAP=softcap != 0.0, BLOCK=BLOCK, GROUPS=triton.next_power_of_2(n_groups), num_warps=WARPS,
        )  # fmt: skip
    return ids, logprobs, lse, label_logprob
