"""The sparse soft cross-entropy in plain torch: the definition the kernels are checked against, and the
fallback.

Shapes: C rows (a chunk), V vocabulary, K teacher entries a row. A row's K distinct ids and the rest of the
    vocabulary (the tail) are its cells. With Q_c the student's mass in cell c and L = Σ f_c(Q_c), every
    divergence has the gradient ∂L/∂z_j = q_j (L'_c(j) − Σ_c Q_c L'_c). Written per cell, with g_c = Q_c L'_c,
    a cell receives α_c = g_c − Q_c Σ g in total, spread over its tokens as the student's own distribution
    inside the cell. Nothing is divided by a mass that may be zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_LABEL = -100
DIVERGENCES = ("ce", "kl", "reverse_kl", "jsd", "tvd", "skew_kl", "alpha")
MISSING = ("renormalise", "tail", "zero", "uniform")
# Where a formula needs the logarithm of a teacher's mass that may be zero (fp16 log-probabilities err by 4e-4
# relative).
MASS_FLOOR = 1e-6


def merge_duplicates(ids: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add the mass of equal ids into their first occurrence.

    Returns p [C, K], which entries are cells [C, K], and for every entry the index of a cell [C, K]: its own,
    or the row's first where the entry is absent, so that a scatter over all K entries needs no mask.
    """
    present = ids >= 0
    equal = (ids.unsqueeze(2) == ids.unsqueeze(1)) & present.unsqueeze(2)  # [C, K, K]
    first = equal.to(torch.uint8).argmax(2)
    merged = torch.zeros_like(p).scatter_add_(1, first, torch.where(present, p, 0.0))
    is_cell = present & (first == torch.arange(ids.shape[1], device=ids.device))
    owner = torch.where(present, first, is_cell.to(torch.uint8).argmax(1, keepdim=True))
    return torch.where(is_cell, merged, 0.0), is_cell, owner


def teacher_cells(
    ids: Tensor, logprobs: Tensor, partition: Tensor, vocabulary: int, missing: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the teacher's p [C, K], which entries are cells and whose [C, K] twice, and the tail's p [C].

    Duplicates add up. The temperature acts on cells: p_c^(1/T) / Σ p^(1/T), the tail counting as one. A sum
    above one, the rounding of stored log-probabilities, is scaled back to one, and so is what is left when
    the cells are the whole vocabulary.
    """
    p, is_cell, owner = merge_duplicates(ids, torch.where(ids >= 0, logprobs.float(), float("-inf")).exp())
    p_tail = (1.0 - p.sum(1)).clamp(min=0.0)
    has_tail = is_cell.sum(1) < vocabulary
    if missing == "renormalise":
        has_tail = has_tail & partition
    p_tail = torch.where(has_tail, p_tail, 0.0)
    tiny = torch.finfo(torch.float32).tiny
    for power in (1.0,) if temperature == 1.0 else (1.0, 1.0 / temperature):
        p, p_tail = p**power, p_tail**power
        total = (p.sum(1) + p_tail).clamp(min=tiny)
        p, p_tail = p / total.unsqueeze(1), p_tail / total
    return p, is_cell, owner, p_tail


def divergence_terms(divergence: str, p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return f(Q) and g = Q f'(Q) of each cell, given the teacher's mass p and the student's log Q; sums over
    cells are L.

    ce −Σ p log Q; kl Σ p log(p/Q); reverse_kl Σ Q log(Q/p); jsd β KL(p‖m) + (1−β) KL(Q‖m), m = βp + (1−β)Q
    (arXiv 2306.13649, eq. 1); tvd ½ Σ|p − Q|; skew_kl KL(p ‖ βp + (1−β)Q) (arXiv 2402.03898, eq. 3); alpha Σ
    (βp + (1−β)Q − p^β Q^(1−β)) / (β(1−β)).
    """
    q = log_q.exp()
    if divergence == "ce":
        return torch.where(p > 0, -p * log_q, 0.0), -p
    if divergence == "kl":
        return torch.where(p > 0, p * (p.log() - log_q), 0.0), -p
    if divergence == "tvd":
        return 0.5 * (p - q).abs(), 0.5 * q * torch.sign(q - p)
    if divergence == "reverse_kl":
        ratio = torch.where(q > 0, log_q - p.clamp(min=MASS_FLOOR).log(), 0.0)
        return q * ratio, q * (ratio + 1.0)
    if divergence == "alpha":
        mixed = torch.where(p > 0, torch.exp(beta * p.log() + (1.0 - beta) * log_q), 0.0)
        return (beta * p + (1.0 - beta) * q - mixed) / (beta * (1.0 - beta)), (q - mixed) / beta
    m = beta * p + (1.0 - beta) * q
    p_ratio = torch.where(p > 0, p.log() - m.log(), 0.0)
    if divergence == "skew_kl":
        return p * p_ratio, torch.where(p > 0, -p * (1.0 - beta) * q / m, 0.0)
    if divergence == "jsd":
        q_ratio = torch.where(q > 0, log_q - m.log(), 0.0)
        return beta * p * p_ratio + (1.0 - beta) * q * q_ratio, (1.0 - beta) * q * q_ratio
    raise ValueError(f"unknown divergence {divergence!r}, expected one of {', '.join(DIVERGENCES)}")


def sparse_soft_ce_chunk(
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
    """Compute a chunk of rows, and write row_scale · ∂loss/∂logits to `grad` ([C, V], may be `logits`) if it
    is given.

    Equal, for divergence ce and missing zero, to

        q = softmax(logits); t = hard_weight·onehot(labels) + (1 − hard_weight)·Σ_k p_k·onehot(ids_k)
        loss = −(t · log q); grad = row_scale · (Σt · q − t)

    logits [C, V] of any floating dtype, labels int64[C], ids int64[C, K], logprobs [C, K], hard_weight and
    row_scale float32[C], partition bool[C]; softcap 0 means none. Returns loss, hard, soft, lse float32[C]
    and correct bool[C], 0 and False where the label is −100.
    """
    vocabulary = logits.shape[1]
    tau, n_entries = student_temperature, ids.shape[1]
    z = logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    # Exponents are differences to a maximum, never to lse: with |lse| near 500 its rounding alone would cost 3e-5.
    top = z.amax(1, keepdim=True)
    valid = labels != IGNORE_LABEL
    label = torch.where(valid, labels, 0).unsqueeze(1)
    z_label = (z.gather(1, label) - top).squeeze(1)
    sum_z = torch.exp(z - top).sum(1)
    lse_z = sum_z.log()
    lse = top.squeeze(1) + lse_z
    correct = valid & (z_label >= 0.0)
    hard = lse_z - z_label
    if label_smoothing:
        hard = hard + label_smoothing * (z_label - (z - top).mean(1))
    soft = torch.zeros_like(hard)
    soft_weight = torch.zeros_like(hard)

    if n_entries:
        p, is_cell, owner, p_tail = teacher_cells(ids, logprobs, partition, vocabulary, missing, temperature)
        active = is_cell.any(1)
        soft_weight = torch.where(active, 1.0 - hard_weight, 0.0)
        x = z / tau
        slot = torch.where(active.unsqueeze(1), ids.gather(1, owner), 0)
        x_slot = x.gather(1, slot)
        x_k = torch.where(is_cell, x_slot - top / tau, float("-inf"))
        # Summing the tail without the cells' tokens keeps it exact: 1 − Σ Q_k would cancel.
        rest = x.scatter(1, slot, torch.where(active.unsqueeze(1), float("-inf"), x_slot))
        top_tail = rest.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        sum_tail = torch.exp(rest - top_tail).sum(1)
        lse_tail = (top_tail - top / tau).squeeze(1) + sum_tail.log()
        lse_x = torch.logaddexp(lse_tail, torch.logsumexp(x_k, 1))
        log_q = torch.cat([x_k, lse_tail.unsqueeze(1)], 1) - lse_x.unsqueeze(1)  # [C, K + 1], the tail last
        cells = torch.cat([is_cell, torch.ones_like(valid).unsqueeze(1)], 1)
        f, g = divergence_terms(divergence, torch.cat([p, p_tail.unsqueeze(1)], 1), log_q, beta)
        f, g = torch.where(cells, f, 0.0), torch.where(cells, g, 0.0)
        spread = torch.zeros_like(hard)
        if missing == "zero":
            f[:, -1], g[:, -1] = torch.where(partition, f[:, -1], 0.0), torch.where(partition, g[:, -1], 0.0)
        sum_g = g.sum(1)
        if missing == "uniform":
            n_rest = (vocabulary - is_cell.sum(1)).clamp(min=1)
            mean_rest = torch.where(rest == float("-inf"), 0.0, rest - top / tau).sum(1) / n_rest
            f_spread = p_tail * (lse_x - mean_rest)
            if divergence == "kl":
                f_spread = f_spread + torch.where(p_tail > 0, p_tail * (p_tail / n_rest).log(), 0.0)
            f[:, -1] = torch.where(partition, f[:, -1], f_spread)
            # The tail's gradient is flat, −p_tail / n_rest a token, instead of following the student inside
            # the tail.
            spread = torch.where(partition, 0.0, p_tail / n_rest)
            g[:, -1] = torch.where(partition, g[:, -1], 0.0)
        alpha = g - torch.where(cells, log_q.exp(), 0.0) * sum_g.unsqueeze(1)
        soft = torch.where(active, f.sum(1) * tau * tau, 0.0)

    hard_part = torch.where(valid, hard_weight, 0.0)
    loss = hard_weight * hard + soft_weight * soft + z_loss * lse * lse

    if grad is not None:
        dense = hard_part + 2.0 * z_loss * lse
        g_z = torch.exp(z - top).mul_((dense / sum_z).unsqueeze(1))
        if label_smoothing:
            g_z -= (hard_part * label_smoothing / vocabulary).unsqueeze(1)
        if n_entries:
            per_tail = alpha[:, -1] / sum_tail.clamp(min=torch.finfo(torch.float32).tiny)
            g_x = torch.exp(rest - top_tail).mul_(per_tail.unsqueeze(1))
            g_x -= spread.unsqueeze(1)
            g_x.scatter_(1, slot, torch.where(active.unsqueeze(1), alpha.gather(1, owner), 0.0))
            g_z += g_x.mul_((soft_weight * tau).unsqueeze(1))
        g_z.scatter_add_(1, label, (-(1.0 - label_smoothing) * hard_part).unsqueeze(1))
        if softcap:
            g_z *= 1.0 - (z / softcap).square()
        g_z *= torch.where(valid, row_scale, 0.0).unsqueeze(1)
        # A row that does not count must be zero whatever its logits hold: 0 · NaN would not be.
        grad.copy_(g_z.masked_fill_(~valid.unsqueeze(1), 0.0))

    loss, hard, soft, lse = (torch.where(valid, value, 0.0) for value in (loss, hard, soft, lse))
    return loss, hard, soft, lse, correct
