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

LOWEST = tl.constexpr(-3.0e38)
TINY = tl.constexpr(1.1754944e-38)
MASS_FLOOR = tl.constexpr(1e-6)
IGNORE_LABEL = tl.constexpr(-100)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _divergence_terms(p, log_q, beta, DIVERGENCE: tl.constexpr):
    """f(Q) and g = Q f'(Q) of each cell; add a divergence here and in reference.py."""
    q = tl.exp(log_q)
    log_p = tl.log(tl.maximum(p, TINY))
    if DIVERGENCE == "ce":
        f = tl.where(p > 0, -p * log_q, 0.0)
        g = -p
    elif DIVERGENCE == "kl":
        f = tl.where(p > 0, p * (log_p - log_q), 0.0)
        g = -p
    elif DIVERGENCE == "tvd":
        f = 0.5 * tl.abs(p - q)
        g = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    elif DIVERGENCE == "reverse_kl":
        ratio = tl.where(q > 0, log_q - tl.log(tl.maximum(p, MASS_FLOOR)), 0.0)
        f = q * ratio
        g = q * (ratio + 1.0)
    elif DIVERGENCE == "alpha":
        mixed = tl.where(p > 0, tl.exp(beta * log_p + (1.0 - beta) * log_q), 0.0)
        f = (beta * p + (1.0 - beta) * q - mixed) / (beta * (1.0 - beta))
        g = (q - mixed) / beta
    else:
        mixture = beta * p + (1.0 - beta) * q
        log_mixture = tl.log(tl.maximum(mixture, TINY))
        p_part = tl.where(p > 0, p * (log_p - log_mixture), 0.0)
        if DIVERGENCE == "skew_kl":
            f = p_part
            g = tl.where(p > 0, -p * (1.0 - beta) * q / mixture, 0.0)
        else:
            tl.static_assert(DIVERGENCE == "jsd", "unknown divergence")
            q_part = tl.where(q > 0, q * (log_q - log_mixture), 0.0)
            f = beta * p_part + (1.0 - beta) * q_part
            g = (1.0 - beta) * q_part
    return f, g


@triton.jit
def _capped(u, cap, CAP: tl.constexpr):
    """cap · tanh(u / cap), and its derivative."""
    slope = u * 0.0 + 1.0
    z = u
    if CAP:
        e = tl.exp(tl.minimum(2.0 * tl.abs(u) / cap, 80.0))
        z = cap * (1.0 - 2.0 / (e + 1.0))
        z = tl.where(u < 0, -z, z)
        slope = 4.0 * e / ((e + 1.0) * (e + 1.0))
    return z, slope


@triton.jit
def _scan_block(
    u, top, total, total_hard, total_z, base, inv_tau, cap, TAU: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr
):
    """Add a block to the running maximum, Σ exp((z − top) / τ), Σ exp(z − top) and Σ (z − base)."""
    u = u.to(tl.float32)
    z, _ = _capped(u, cap, CAP)
    if CAP:
        z = tl.where(u == MINUS_INFINITY, u, z)  # tanh would bring the cells' −∞ back
    new_top = tl.maximum(top, tl.max(z, 0))
    if TAU:
        total = total * tl.exp((top - new_top) * inv_tau) + tl.sum(tl.exp((z - new_top) * inv_tau), 0)
        total_hard = total_hard * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
    else:
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
    if SUMS:
        total_z += tl.sum(tl.where(z == MINUS_INFINITY, 0.0, z - base), 0)
    return new_top, total, total_hard, total_z


@triton.jit
def _gradient_block(u, top, a, a_hard, offset, inv_tau, cap, TAU: tl.constexpr, CAP: tl.constexpr):
    u = u.to(tl.float32)
    z, slope = _capped(u, cap, CAP)
    if TAU:
        g = a * tl.exp((z - top) * inv_tau) + a_hard * tl.exp(z - top) + offset
    else:
        g = a * tl.exp(z - top) + offset
    if CAP:
        g *= slope
    return g


@triton.jit
def _sparse_soft_ce(
    Z, G, LABELS, IDS, LOGPROBS, HARD_WEIGHT, ROW_SCALE, PARTITION, LOSS, HARD, SOFT, LSE, CORRECT,
    z_stride, g_stride, V, K, inv_temperature, tau, inv_tau, beta, smoothing, z_weight, cap,
    DIVERGENCE: tl.constexpr, MISSING: tl.constexpr, TEMPERED: tl.constexpr, TAU: tl.constexpr, CAP: tl.constexpr,
    SUMS: tl.constexpr, GRAD: tl.constexpr, INPLACE: tl.constexpr, KB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * z_stride
    g_row = G + row * g_stride
    label = tl.load(LABELS + row)
    # The main loop has no mask: with V not a multiple of 16 a masked one would lose its 128-bit loads.
    n_whole = V // BLOCK
    columns = tl.arange(0, BLOCK)
    last = n_whole * BLOCK + columns
    if label == IGNORE_LABEL:
        if GRAD:
            zero = tl.zeros([BLOCK], Z.dtype.element_ty)
            for block in range(0, n_whole):
                tl.store(g_row + block * BLOCK + columns, zero)
            tl.store(g_row + last, zero, mask=last < V)
        tl.store(LOSS + row, 0.0)
        tl.store(HARD + row, 0.0)
        tl.store(SOFT + row, 0.0)
        tl.store(LSE + row, 0.0)
        tl.store(CORRECT + row, False)
    else:
        hard_weight = tl.load(HARD_WEIGHT + row)
        # An index outside the vocabulary must not read elsewhere, nor pass for absent: the row's loss becomes NaN.
        broken = (label < 0) | (label >= V)
        label = tl.where(broken, 0, label)
        u_label = tl.load(z_row + label).to(tl.float32)
        z_label, slope_label = _capped(u_label, cap, CAP)
        if KB > 0:
            k = tl.arange(0, KB)
            ids = tl.load(IDS + row * K + k, mask=k < K, other=-1)
            broken |= tl.max((ids >= V).to(tl.int32), 0) > 0
            present = (ids >= 0) & (ids < V)
            slot = z_row + tl.where(present, ids, 0)
            u_k = tl.load(slot, mask=present, other=MINUS_INFINITY)
            z_k, slope_k = _capped(u_k.to(tl.float32), cap, CAP)
            p = tl.exp(tl.load(LOGPROBS + row * K + k, mask=present, other=MINUS_INFINITY).to(tl.float32))
            equal = (ids[:, None] == ids[None, :]) & present[:, None] & present[None, :]
            p = tl.sum(tl.where(equal, p[None, :], 0.0), 1)  # equal ids add up
            is_cell = present & (tl.sum((equal & (k[None, :] < k[:, None])).to(tl.int32), 1) == 0)
            z_k = tl.where(present, z_k, MINUS_INFINITY)
            tl.debug_barrier()
            tl.store(slot, tl.full([KB], MINUS_INFINITY, tl.float32).to(Z.dtype.element_ty), mask=present)
            tl.debug_barrier()

        top = LOWEST
        total = 0.0
        total_hard = 0.0
        total_z = 0.0
        for block in range(0, n_whole):
            u = tl.load(z_row + block * BLOCK + columns)
            top, total, total_hard, total_z = _scan_block(
                u, top, total, total_hard, total_z, z_label, inv_tau, cap, TAU, CAP, SUMS
            )
        if n_whole * BLOCK < V:
            u = tl.load(z_row + last, mask=last < V, other=MINUS_INFINITY)
            top, total, total_hard, total_z = _scan_block(
                u, top, total, total_hard, total_z, z_label, inv_tau, cap, TAU, CAP, SUMS
            )

        # `tail` is the tail's own maximum, `top` from here on the row's.
        tail = top
        n_rest = V
        if KB > 0:
            top = tl.maximum(tail, tl.max(tl.where(is_cell, z_k, LOWEST), 0))
            n_rest = V - tl.sum(is_cell.to(tl.int32), 0)
            if not INPLACE:
                tl.debug_barrier()
                tl.store(slot, u_k, mask=present)
                tl.debug_barrier()
        hard_in_tail = total_hard if TAU else total
        sum_hard = hard_in_tail * tl.exp(tail - top)
        sum_z = total_z
        if KB > 0:
            sum_hard += tl.sum(tl.where(is_cell, tl.exp(z_k - top), 0.0), 0)
            if SUMS:
                sum_z += tl.sum(tl.where(is_cell, z_k - z_label, 0.0), 0)
        log_hard = tl.log(sum_hard)
        lse = top + log_hard
        hard = log_hard - (z_label - top)
        if SUMS:
            hard -= smoothing * (sum_z / V)  # the mean is relative to the label's logit

        soft = 0.0
        soft_weight = 0.0
        alpha_tail = 0.0
        spread = 0.0
        if KB > 0:
            partition = tl.load(PARTITION + row) != 0
            has_cells = n_rest < V
            soft_weight = tl.where(has_cells, 1.0 - hard_weight, 0.0)
            p = tl.where(is_cell, p, 0.0)
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
            x_tail = tl.where(total > 0, (tail - top) * inv_tau + tl.log(tl.maximum(total, TINY)), MINUS_INFINITY)
            x_top = tl.maximum(x_tail, tl.max(tl.where(is_cell, x_k, LOWEST), 0))
            x_sum = tl.sum(tl.where(is_cell, tl.exp(x_k - x_top), 0.0), 0) + tl.exp(x_tail - x_top)
            log_sum = x_top + tl.log(x_sum)
            f, g = _divergence_terms(p, x_k - log_sum, beta, DIVERGENCE)
            f_tail, g_tail = _divergence_terms(p_tail, x_tail - log_sum, beta, DIVERGENCE)
            f = tl.where(is_cell, f, 0.0)
            g = tl.where(is_cell, g, 0.0)
            sum_g = tl.sum(g, 0)
            if MISSING == "uniform":
                # The tail's gradient is flat instead of following the student inside the tail.
                rest = tl.maximum(n_rest, 1).to(tl.float32)
                flat = tl.where(partition | (n_rest == 0), 0.0, p_tail)
                mean_rest = ((total_z / rest) + (z_label - top)) * inv_tau
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
            flat_hard = -scale * hard_weight * smoothing / V
            at_label = -scale * hard_weight * (1.0 - smoothing)
            to_top = tl.exp(tail - top)
            a = per_soft * alpha_tail / tl.maximum(total, TINY)
            a_hard = per_hard * to_top
            offset = flat_hard - per_soft * spread
            if not TAU:
                a += a_hard
            if n_whole * BLOCK < V:
                u = tl.load(z_row + last, mask=last < V, other=MINUS_INFINITY)
                value = _gradient_block(u, tail, a, a_hard, offset, inv_tau, cap, TAU, CAP)
                tl.store(g_row + last, value.to(Z.dtype.element_ty), mask=last < V)
            for step in range(0, n_whole):
                block = n_whole - 1 - step
                u = tl.load(z_row + block * BLOCK + columns)
                value = _gradient_block(u, tail, a, a_hard, offset, inv_tau, cap, TAU, CAP)
                tl.store(g_row + block * BLOCK + columns, value.to(Z.dtype.element_ty))
            tl.debug_barrier()
            # The label first: where it is a cell, the cell's own store below replaces this one.
            value = a * tl.exp((z_label - tail) * inv_tau) + offset
            if TAU:
                value += a_hard * tl.exp(z_label - tail)
            is_label_cell = False
            if KB > 0:
                is_label_cell = tl.max((present & (ids == label)).to(tl.int32), 0) > 0
            value = (value + at_label) * slope_label
            tl.store(g_row + label, value.to(Z.dtype.element_ty), mask=is_label_cell == 0)
            if KB > 0:
                value = per_soft * alpha + per_hard * tl.exp(z_k - top) + flat_hard
                value = (value + tl.where(ids == label, at_label, 0.0)) * slope_k
                tl.store(g_row + tl.where(present, ids, 0), value.to(Z.dtype.element_ty), mask=is_cell)


def block_and_warps(vocabulary: int, element_bytes: int) -> tuple[int, int]:
    """Return the elements of a block and the warps of a program.

    `fusechat profile kernels` shows what each takes in registers: eight fp32 elements a thread on 16 warps spill.
    """
    block = min(triton.next_power_of_2(max(vocabulary, 1)), 16384 // element_bytes)
    return block, 16 if block == 8192 else 8 if block >= 1024 else 4


def sparse_soft_ce_rows(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    hard_weight: Tensor,
    row_scale: Tensor,
    partition: Tensor,
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
    """Compute what `reference.sparse_soft_ce_chunk` defines, for all rows of logits [N, V] in one launch.

    Rows may be apart, their elements not. A label or an id outside the vocabulary makes the row's loss NaN.
    """
    n_rows, vocabulary = logits.shape
    if logits.stride(1) != 1 or (grad is not None and grad.stride(1) != 1):
        raise ValueError("rows of logits and of their gradient must be contiguous")
    n_entries = ids.shape[1]
    outputs = [torch.empty(n_rows, dtype=torch.float32, device=logits.device) for _ in range(4)]
    correct = torch.empty(n_rows, dtype=torch.bool, device=logits.device)
    if n_rows == 0:
        return (*outputs, correct)
    block, warps = block_and_warps(vocabulary, logits.element_size())
    target = logits if grad is None else grad
    _sparse_soft_ce[(n_rows,)](
        logits,
        target,
        labels,
        ids.contiguous(),
        logprobs.contiguous(),
        hard_weight,
        row_scale,
        partition,
        *outputs,
        correct,
        logits.stride(0),
        target.stride(0),
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
        TAU=student_temperature != 1.0,
        CAP=softcap != 0.0,
        SUMS=label_smoothing != 0.0 or missing == "uniform",
        GRAD=grad is not None,
        INPLACE=grad is not None and grad.data_ptr() == logits.data_ptr(),
        KB=triton.next_power_of_2(n_entries) if n_entries else 0,
        BLOCK=block,
        num_warps=warps,
    )
    return (*outputs, correct)
