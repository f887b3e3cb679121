"""The sparse soft cross-entropy on logits: one program a row, two passes over it, the gradient in place.

Pass 1 sums the tail online; the K cells' logits are read first and −∞ is stored in their place, so that the tail is
exact without a mask. K scalars become coefficients. Pass 2 runs backwards, for the end of the row is hottest in the L2
cache, and writes coefficient · exp(z − max); K + 1 stores mend the cells and the label. `reference.py` is the same in
torch. Memory traffic: every logit is read twice (the second time from L2 where the rows in flight fit it) and written
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusechat.kernels.divergence import divergence_terms
from fusechat.kernels.launch import block_and_warps, range_programs
from fusechat.kernels.passes import LOG2E, scan_row, write_row, write_zeros
from fusechat.kernels.range_cells import gather_ranges, prepare_ranges, restore_ranges, scatter_ranges
from fusechat.kernels.softcap import capped

LOWEST = tl.constexpr(-3.0e38)
TINY = tl.constexpr(1.1754944e-38)
IGNORE_LABEL = tl.constexpr(-100)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _row(
    row, Z, G, LABELS, IDS, LOGPROBS, HARD_WEIGHT, ROW_SCALE, PARTITION, LOSS, HARD, SOFT, LSE, CORRECT,
    ORDER, LOW, HIGH, SAVED,
    z_stride, g_stride, V, K, inv_temperature, tau, inv_tau, beta, smoothing, z_weight, cap,
    DIVERGENCE: tl.constexpr, MISSING: tl.constexpr, TEMPERED: tl.constexpr, TAU: tl.constexpr, CAP: tl.constexpr,
    SUMS: tl.constexpr, GRAD: tl.constexpr, INPLACE: tl.constexpr, RANGES: tl.constexpr, KB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    z_row = Z + row * z_stride
    g_row = G + row * g_stride
    label = tl.load(LABELS + row)
    if label == IGNORE_LABEL:
        if GRAD:
            write_zeros(g_row, V, BLOCK)
        tl.store(LOSS + row, 0.0)
        tl.store(HARD + row, 0.0)
        tl.store(SOFT + row, 0.0)
        tl.store(LSE + row, 0.0)
        tl.store(CORRECT + row, False)
    else:
        # An index outside the vocabulary must not read elsewhere, nor pass for absent: the row's loss becomes NaN.
        broken = (label < 0) | (label >= V)
        label = tl.where(broken, 0, label)
        u_label = tl.load(z_row + label).to(tl.float32)
        z_label, slope_label = capped(u_label, cap, CAP)
        base = tl.where(z_label == MINUS_INFINITY, 0.0, z_label)
        if KB > 0:
            k = tl.arange(0, KB)
            ids = tl.load(IDS + row * K + k, mask=k < K, other=-1)
            broken |= tl.max((ids >= V).to(tl.int32), 0) > 0
            present = (ids >= 0) & (ids < V)
            slot = z_row + tl.where(present, ids, 0)
            u_k = tl.load(slot, mask=present, other=MINUS_INFINITY)
            z_k, slope_k = capped(u_k.to(tl.float32), cap, CAP)
            if RANGES:
                low = tl.load(LOW + row * K + k, mask=k < K, other=0)
                high = tl.load(HIGH + row * K + k, mask=k < K, other=0)
                broken |= tl.max(((high > low) & ((low < 0) | (high > V))).to(tl.int32), 0) > 0
                wide = (high - low > 1) & (low >= 0) & (high <= V)
                p = tl.exp(tl.load(LOGPROBS + row * K + k, mask=present | wide, other=MINUS_INFINITY).to(tl.float32))
                equal = (low[:, None] == low[None, :]) & (high[:, None] == high[None, :])
                equal &= (present | wide)[:, None] & (present | wide)[None, :]
            else:
                wide = k < 0
                p = tl.exp(tl.load(LOGPROBS + row * K + k, mask=present, other=MINUS_INFINITY).to(tl.float32))
                equal = (ids[:, None] == ids[None, :]) & present[:, None] & present[None, :]
            p = tl.sum(tl.where(equal, p[None, :], 0.0), 1)  # equal ids add up
            is_cell = (present | wide) & (tl.sum((equal & (k[None, :] < k[:, None])).to(tl.int32), 1) == 0)
            z_k = tl.where(present, z_k, MINUS_INFINITY)
            tl.debug_barrier()
            tl.store(slot, tl.full([KB], MINUS_INFINITY, tl.float32).to(Z.dtype.element_ty), mask=present)
            # What a cell's logits add up to relative to the highest of them, z_k; a single id is its own sum.
            n_k = is_cell.to(tl.int32)
            sum_k = tl.full([KB], 1.0, tl.float32)
            hard_k = sum_k
            counts_k = z_k != MINUS_INFINITY
            total_k = tl.where(counts_k, z_k - base, 0.0)
            finite_k = counts_k.to(tl.int32)
            if RANGES:
                z_k, sum_k, hard_k, total_k, n_k, finite_k = gather_ranges(
                    z_row, SAVED, ORDER, LOW + row * K, HIGH + row * K, K, k, low, high, is_cell, wide,
                    z_k, total_k, n_k, finite_k, base, inv_tau, cap, TAU, CAP, SUMS, KB,
                )  # fmt: skip
                is_cell &= n_k > 0  # a range none of whose tokens is left counts as missing mass
            tl.debug_barrier()

        rate = inv_tau * LOG2E
        top, total, total_hard, total_z, n_z = scan_row(z_row, V, base, rate, cap, TAU, CAP, SUMS, BLOCK)

        # Not before pass 1, whose registers it would take a part of.
        hard_weight = tl.load(HARD_WEIGHT + row)
        # `tail` is the tail's own maximum, `top` from here on the row's.
        tail = top
        n_rest = V
        if KB > 0:
            top = tl.maximum(tail, tl.max(tl.where(is_cell, z_k, LOWEST), 0))
            n_rest = V - tl.sum(n_k, 0)
            if not INPLACE:
                tl.debug_barrier()
                tl.store(slot, u_k, mask=present)
                if RANGES:
                    restore_ranges(z_row, SAVED, ORDER, LOW + row * K, HIGH + row * K, K, k, low, high, is_cell, wide)
                tl.debug_barrier()
        hard_in_tail = total_hard if TAU else total
        sum_hard = hard_in_tail * tl.exp(tail - top)
        if KB > 0:
            sum_hard += tl.sum(tl.where(is_cell, hard_k * tl.exp(z_k - top), 0.0), 0)
        log_hard = tl.log(sum_hard)
        lse = top + log_hard
        hard = log_hard - (z_label - top)
        n_finite = 1.0
        if SUMS:
            sum_z = total_z
            count = n_z
            if KB > 0:
                sum_z += tl.sum(tl.where(is_cell, total_k, 0.0), 0)
                count += tl.sum(tl.where(is_cell, finite_k, 0), 0)
            n_finite = tl.maximum(count, 1).to(tl.float32)
            mean = sum_z / n_finite + (base - top)
            hard = log_hard - (1.0 - smoothing) * (z_label - top) - smoothing * mean

        soft = 0.0
        soft_weight = 0.0
        alpha_tail = 0.0
        spread = 0.0
        if KB > 0:
            partition = tl.load(PARTITION + row) != 0
            has_cells = tl.max(is_cell.to(tl.int32), 0) > 0
            soft_weight = tl.where(has_cells, 1.0 - hard_weight, 0.0)
            p = tl.where(is_cell, p, 0.0)
            if MISSING == "uniform":
                # The teacher's mass is spread over the tokens that the model does not rule out.
                n_rest = tl.where(partition, n_rest, n_z)
            tail_counts = n_rest > 0
            if MISSING == "renormalise":
                tail_counts &= partition
            p_tail = tl.where(tail_counts, tl.maximum(1.0 - tl.sum(p, 0), 0.0), 0.0)
            mass = tl.maximum(tl.sum(p, 0) + p_tail, TINY)
            p = p / mass
            p_tail = p_tail / mass
            if TEMPERED:
                p = tl.where(p > 0, tl.exp(tl.log(tl.maximum(p, TINY)) * inv_temperature), 0.0)
                p_tail = tl.where(p_tail > 0, tl.exp(tl.log(tl.maximum(p_tail, TINY)) * inv_temperature), 0.0)
                mass = tl.maximum(tl.sum(p, 0) + p_tail, TINY)
                p = p / mass
                p_tail = p_tail / mass

            x_k = (z_k - top) * inv_tau
            if RANGES:
                x_k += tl.log(sum_k)
            x_tail = tl.where(total > 0, (tail - top) * inv_tau + tl.log(tl.maximum(total, TINY)), MINUS_INFINITY)
            x_top = tl.maximum(x_tail, tl.max(tl.where(is_cell, x_k, LOWEST), 0))
            x_sum = tl.sum(tl.where(is_cell, tl.exp(x_k - x_top), 0.0), 0) + tl.exp(x_tail - x_top)
            log_sum = x_top + tl.log(x_sum)
            f, g = divergence_terms(p, x_k - log_sum, beta, DIVERGENCE)
            f_tail, g_tail = divergence_terms(p_tail, x_tail - log_sum, beta, DIVERGENCE)
            f = tl.where(is_cell, f, 0.0)
            g = tl.where(is_cell, g, 0.0)
            sum_g = tl.sum(g, 0)
            if MISSING == "uniform":
                # The tail's gradient is flat instead of following the student inside the tail.
                rest = tl.maximum(n_rest, 1).to(tl.float32)
                flat = tl.where(partition | (n_rest == 0), 0.0, p_tail)
                mean_rest = ((total_z / rest) + (base - top)) * inv_tau
                f_flat = flat * (log_sum - mean_rest)
                if DIVERGENCE == "kl":
                    f_flat += tl.where(flat > 0, flat * tl.log(tl.maximum(flat, TINY) / rest), 0.0)
                f_tail = tl.where(partition, f_tail, f_flat)
                sum_g += tl.where(partition, g_tail, -flat)
                g_tail = tl.where(partition, g_tail, 0.0)
                spread = flat / rest
            else:
                if MISSING == "zero":
                    f_tail = tl.where(partition, f_tail, 0.0)
                    g_tail = tl.where(partition, g_tail, 0.0)
                f_tail = tl.where(n_rest > 0, f_tail, 0.0)
                g_tail = tl.where(n_rest > 0, g_tail, 0.0)
                sum_g += g_tail
            soft = tl.where(has_cells, (tl.sum(f, 0) + f_tail) * tau * tau, 0.0)
            alpha = g - tl.exp(x_k - log_sum) * sum_g
            alpha_tail = g_tail - tl.exp(x_tail - log_sum) * sum_g

        loss = hard_weight * hard + soft_weight * soft + z_weight * lse * lse
        poison = tl.where(broken, float("nan"), 0.0)
        tl.store(LOSS + row, loss + poison)
        tl.store(HARD + row, hard)
        tl.store(SOFT + row, soft)
        tl.store(LSE + row, lse)
        tl.store(CORRECT + row, z_label >= top)

        if GRAD:
            scale = tl.load(ROW_SCALE + row)
            per_hard = scale * (hard_weight + 2.0 * z_weight * lse) / sum_hard
            per_soft = scale * soft_weight * tau
            flat_hard = -scale * hard_weight * smoothing / n_finite
            at_label = -scale * hard_weight * (1.0 - smoothing)
            to_top = tl.exp(tail - top)
            a = per_soft * alpha_tail / tl.maximum(total, TINY)
            a_hard = per_hard * to_top
            offset = flat_hard - per_soft * spread
            if not TAU:
                a += a_hard
            write_row(z_row, g_row, V, tail, a, a_hard, offset, rate, cap, TAU, CAP, SUMS, BLOCK)
            tl.debug_barrier()
            # The label first: where it is a cell, the cell's own store below replaces this one.
            value = a * tl.exp((z_label - tail) * inv_tau) + tl.where(z_label == MINUS_INFINITY, 0.0, offset)
            if TAU:
                value += a_hard * tl.exp(z_label - tail)
            is_label_cell = False
            if KB > 0:
                is_label_cell = tl.max((present & (ids == label)).to(tl.int32), 0) > 0
            value = (value + at_label) * slope_label
            tl.store(g_row + label, value.to(Z.dtype.element_ty), mask=is_label_cell == 0)
            if KB > 0:
                if RANGES:
                    tl.debug_barrier()
                    scatter_ranges(
                        g_row, SAVED, ORDER, LOW + row * K, HIGH + row * K, K, k, low, high, is_cell, wide,
                        per_soft * alpha / sum_k, z_k, per_hard, top, flat_hard, label, at_label, inv_tau, cap, CAP,
                    )  # fmt: skip
                value = per_soft * alpha + per_hard * tl.exp(z_k - top) + tl.where(counts_k, flat_hard, 0.0)
                value = (value + tl.where(ids == label, at_label, 0.0)) * slope_k
                tl.store(g_row + tl.where(present, ids, 0), value.to(Z.dtype.element_ty), mask=is_cell & present)


# The rows of a chunk and the entries of a row change from step to step: no code of their own for 1 and multiples of 16.
@triton.jit(do_not_specialize=["N", "K"])
def _sparse_soft_ce(
    Z, G, LABELS, IDS, LOGPROBS, HARD_WEIGHT, ROW_SCALE, PARTITION, LOSS, HARD, SOFT, LSE, CORRECT,
    ORDER, LOW, HIGH, SAVED, HAS_RANGES,
    z_stride, g_stride, N, V, K, inv_temperature, tau, inv_tau, beta, smoothing, z_weight, cap,
    DIVERGENCE: tl.constexpr, MISSING: tl.constexpr, TEMPERED: tl.constexpr, TAU: tl.constexpr, CAP: tl.constexpr,
    SUMS: tl.constexpr, GRAD: tl.constexpr, INPLACE: tl.constexpr, SELECT: tl.constexpr, RANGES: tl.constexpr,
    KB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if RANGES:
        # A scratch row a program, so few programs, of several rows each.
        saved = SAVED + program * V
        for row in range(program, N, tl.num_programs(0)):
            if tl.load(HAS_RANGES + row) != 0:
                _row(
                    row, Z, G, LABELS, IDS, LOGPROBS, HARD_WEIGHT, ROW_SCALE, PARTITION, LOSS, HARD, SOFT, LSE,
                    CORRECT, ORDER, LOW, HIGH, saved,
                    z_stride, g_stride, V, K, inv_temperature, tau, inv_tau, beta, smoothing, z_weight, cap,
                    DIVERGENCE, MISSING, TEMPERED, TAU, CAP, SUMS, GRAD, INPLACE, True, KB, BLOCK,
                )  # fmt: skip
    else:
        # One row a program: a loop over rows would cost it half as many registers again.
        mine = True
        if SELECT:
            mine = tl.load(HAS_RANGES + program) == 0
        if mine:
            _row(
                program, Z, G, LABELS, IDS, LOGPROBS, HARD_WEIGHT, ROW_SCALE, PARTITION, LOSS, HARD, SOFT, LSE,
                CORRECT, ORDER, LOW, HIGH, SAVED,
                z_stride, g_stride, V, K, inv_temperature, tau, inv_tau, beta, smoothing, z_weight, cap,
                DIVERGENCE, MISSING, TEMPERED, TAU, CAP, SUMS, GRAD, INPLACE, False, KB, BLOCK,
            )  # fmt: skip


def sparse_soft_ce_rows(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    hard_weight: Tensor,
    row_scale: Tensor,
    partition: Tensor,
    order: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    *,
    divergence: str,
    missing: str,
    temperature: float,
    student_temperature: float,
    beta: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `reference.sparse_soft_ce_chunk` defines, for all rows of logits [N, V].

    Rows with ranges are a launch of their own, so that the others cost what they cost without. Rows may be apart,
    their elements not. A label, an id or a range outside the vocabulary makes the row's loss NaN.
    """
    n_rows, vocabulary = logits.shape
    if logits.stride(1) != 1 or (grad is not None and grad.stride(1) != 1):
        raise ValueError("rows of logits and of their gradient must be contiguous")
    n_entries = ids.shape[1]
    outputs = [logits.new_empty(n_rows, dtype=torch.float32) for _ in range(4)]
    correct = logits.new_empty(n_rows, dtype=torch.bool)
    if n_rows == 0:
        return (*outputs, correct)
    amd = torch.version.hip is not None
    tau, cap, sums = student_temperature != 1.0, softcap != 0.0, label_smoothing != 0.0 or missing == "uniform"
    programs = range_programs(n_rows, logits.device)
    target = logits if grad is None else grad
    select = order is not None and n_entries > 0
    has_ranges, saved = partition, logits
    if order is not None and low is not None and high is not None and select:
        ids, low, high, has_ranges = prepare_ranges(ids, order, low, high)
        saved = torch.empty(programs, vocabulary, dtype=logits.dtype, device=logits.device)
    for ranges in (False, True) if select else (False,):
        block, warps = block_and_warps(
            vocabulary, logits.element_size(), wants_registers=n_entries > 64 or tau or cap or sums or ranges or amd
        )
        with torch.cuda.device_of(logits):
            _sparse_soft_ce[(programs if ranges else n_rows,)](
                logits,
                target,
                *(labels, ids.contiguous(), logprobs.contiguous(), hard_weight, row_scale, partition),
                *outputs,
                correct,
                *((order, low, high) if select else (ids, ids, ids)),
                saved,
                has_ranges,
                logits.stride(0),
                target.stride(0),
                n_rows,
                vocabulary,
                n_entries,
                1.0 / temperature,
                student_temperature,
                1.0 / student_temperature,
                beta,
                label_smoothing,
                z_loss,
                softcap or 1.0,
                DIVERGENCE=divergence,
                MISSING=missing,
                TEMPERED=temperature != 1.0,
                TAU=tau,
                CAP=cap,
                SUMS=sums,
                GRAD=grad is not None,
                INPLACE=grad is not None and grad.data_ptr() == logits.data_ptr(),
                SELECT=select,
                RANGES=ranges,
                KB=triton.next_power_of_2(n_entries) if n_entries else 0,
                BLOCK=block,
                num_warps=warps,
            )
    return (*outputs, correct)
