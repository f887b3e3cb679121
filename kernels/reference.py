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
# Where a formula needs the logarithm of a teacher's mass that may be zero (fp16 log-probabilities err by 4e-4
# relative).
MASS_FLOOR = 1e-6


def cap_slope(logits: Tensor, softcap: float) -> Tensor:
    """Return the derivative of softcap · tanh(logits / softcap); 1 − tanh² would cancel where the cap is reached."""
    e = torch.exp(logits.abs() * (-2.0 / softcap))
    return 4.0 * e / (1.0 + e).square()


def merge_duplicates(keys: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add the mass of entries with equal keys into the first of them; a key of −1 is absent.

    Returns p [C, K], which entries are cells [C, K], and for every entry the index of a cell [C, K]: its own,
    or the row's first where the entry is absent, so that a scatter over all K entries needs no mask.
    """
    present = keys >= 0
    equal = (keys.unsqueeze(2) == keys.unsqueeze(1)) & present.unsqueeze(2)  # [C, K, K]
    first = equal.to(torch.uint8).argmax(2)
    merged = torch.zeros_like(p).scatter_add_(1, first, torch.where(present, p, 0.0))
    is_cell = present & (first == torch.arange(keys.shape[1], device=keys.device))
    owner = torch.where(present, first, is_cell.to(torch.uint8).argmax(1, keepdim=True))
    return torch.where(is_cell, merged, 0.0), is_cell, owner


def teacher_masses(p: Tensor, tail_counts: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the teacher's mass of each cell [C, K] and of the tail [C], brought to a sum of one.

    The temperature acts on cells: p_c^(1/T) / Σ p^(1/T), the tail counting as one. A sum above one, the
        rounding of stored log-probabilities, is scaled back to one, and so is what is left where the tail
        does not count.
    """
    p_tail = torch.where(tail_counts, (1.0 - p.sum(1)).clamp(min=0.0), 0.0)
    tiny = torch.finfo(torch.float32).tiny
    for power in (1.0,) if temperature == 1.0 else (1.0, 1.0 / temperature):
        p, p_tail = p**power, p_tail**power
        total = (p.sum(1) + p_tail).clamp(min=tiny)
        p, p_tail = p / total.unsqueeze(1), p_tail / total
    return p, p_tail


def cell_of_tokens(ids: Tensor, low: Tensor, high: Tensor, is_cell: Tensor, order: Tensor) -> Tensor:
    """Return the cell of every token int64[C, V]: a single id, else the smallest range around it, else K, the
    tail."""
    n_rows, n_entries = ids.shape
    ranks = torch.arange(order.shape[0], device=ids.device)
    by_rank = torch.full((n_rows, order.shape[0]), n_entries, device=ids.device)
    width = torch.where(is_cell, high - low, 0)
    # Wide ranges first, so that the smaller ones inside overwrite them.
    for entry in width.argsort(1, descending=True).unbind(1):
        inside = (ranks >= low.gather(1, entry.unsqueeze(1))) & (ranks < high.gather(1, entry.unsqueeze(1)))
        counts = inside & (width.gather(1, entry.unsqueeze(1)) > 0)
        by_rank = torch.where(counts, entry.unsqueeze(1), by_rank)
    cell = torch.empty_like(by_rank).scatter_(1, order.long().expand(n_rows, -1), by_rank)
    single = is_cell & (width == 0)
    # Entries that are no single id write the cell of token 0 to itself.
    slot = torch.where(single, ids, 0)
    entries = torch.arange(n_entries, device=ids.device).expand(n_rows, -1)
    for k in range(n_entries):
        at = slot[:, k : k + 1]
        cell.scatter_(1, at, torch.where(single[:, k : k + 1], entries[:, k : k + 1], cell.gather(1, at)))
    return cell


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
    raise ValueError(f"unknown divergence {divergence!r}")


def sparse_soft_ce_chunk(
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
    """Compute a chunk of rows, and write row_scale · ∂loss/∂logits to `grad` ([C, V], may be `logits`) if
    given.

    Equal, for divergence ce and missing zero, to

        q = softmax(logits); t = hard_weight·onehot(labels) + (1 − hard_weight)·Σ_k p_k·onehot(ids_k)
        loss = −(t · log q); grad = row_scale · (Σt · q − t)

    logits [C, V] of any floating dtype, labels int64[C], ids int64[C, K], logprobs [C, K], hard_weight and
    row_scale float32[C], partition bool[C]; order int32[V], low and high int32[C, K] or None: an entry with
    high > low is the cell of tokens order[low:high] that lie in no smaller cell. softcap 0 means none.
    Returns loss, hard, soft, lse float32[C] and correct bool[C], 0 and False where the label is −100.
    """
    tau = student_temperature
    z = logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    # Exponents are differences to a maximum, never to lse: with |lse| near 500 its rounding alone would cost
    # 3e-5.
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
        # What the model rules out, −∞, is no token of the vocabulary: the rest shares the label's part.
        counts = z != float("-inf")
        n_counting = counts.sum(1).clamp(min=1)
        mean = torch.where(counts, z - top, 0.0).sum(1) / n_counting
        hard = lse_z - (1.0 - label_smoothing) * z_label - label_smoothing * mean
    soft = torch.zeros_like(hard)
    soft_weight = torch.zeros_like(hard)
    soft_grad = None

    if ids.shape[1]:
        soft, active, soft_grad = _soft_term(
            z / tau, top / tau, ids, logprobs, partition, order, low, high,
            divergence=divergence, missing=missing, temperature=temperature, beta=beta, want_grad=grad is not
            None,
        )  # fmt: skip
        soft_weight = torch.where(active, 1.0 - hard_weight, 0.0)
        soft = torch.where(active, soft * tau * tau, 0.0)

    loss = hard_weight * hard + soft_weight * soft + z_loss * lse * lse

    if grad is not None:
        g_z = torch.exp(z - top).mul_(((hard_weight + 2.0 * z_loss * lse) / sum_z).unsqueeze(1))
        if label_smoothing:
            g_z -= torch.where(counts, (hard_weight * label_smoothing / n_counting).unsqueeze(1), 0.0)
        if soft_grad is not None:
            g_z += soft_grad.mul_((soft_weight * tau).unsqueeze(1))
        g_z.scatter_add_(1, label, (-(1.0 - label_smoothing) * hard_weight).unsqueeze(1))
        if softcap:
            g_z *= cap_slope(logits.float(), softcap)
        g_z *= row_scale.unsqueeze(1)
        # A row that does not count must be zero whatever its logits hold: 0 · NaN would not be.
        grad.copy_(g_z.masked_fill_(~valid.unsqueeze(1), 0.0))

    loss, hard, soft, lse = (torch.where(valid, value, 0.0) for value in (loss, hard, soft, lse))
    return loss, hard, soft, lse, correct


def soft_from_cells(
    log_sums: Tensor,
    p: Tensor,
    is_cell: Tensor,
    partition: Tensor,
    n_rest: Tensor,
    sum_rest: Tensor,
    *,
    divergence: str,
    missing: str,
    temperature: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence [C], what each cell receives of its gradient [C, K + 1], and the tail's flat part
    a token [C].

    log_sums [C, K + 1] are the cells' logsumexp, the tail last, relative to any number; n_rest [C] tokens are
    in the tail and their logits sum to sum_rest [C] relative to the same number.
    """
    tail_counts = (n_rest > 0) & (partition if missing == "renormalise" else torch.ones_like(partition))
    p, p_tail = teacher_masses(torch.where(is_cell, p, 0.0), tail_counts, temperature)
    cells = torch.cat([is_cell, (n_rest > 0).unsqueeze(1)], 1)
    log_sums = torch.where(cells, log_sums, float("-inf"))
    lse = torch.logsumexp(log_sums, 1)
    log_q = log_sums - lse.unsqueeze(1)
    f, g = divergence_terms(divergence, torch.cat([p, p_tail.unsqueeze(1)], 1), log_q, beta)
    f, g = torch.where(cells, f, 0.0), torch.where(cells, g, 0.0)
    if missing == "zero":
        f[:, -1], g[:, -1] = torch.where(partition, f[:, -1], 0.0), torch.where(partition, g[:, -1], 0.0)
    sum_g = g.sum(1)
    spread = torch.zeros_like(lse)
    if missing == "uniform":
        n_rest = n_rest.clamp(min=1)
        f_spread = p_tail * (lse - sum_rest / n_rest)
        if divergence == "kl":
            f_spread = f_spread + torch.where(p_tail > 0, p_tail * (p_tail / n_rest).log(), 0.0)
        f[:, -1] = torch.where(partition, f[:, -1], f_spread)
        # The tail's gradient is flat, −p_tail / n_rest a token, instead of following the student inside the
        # tail.
        spread = torch.where(partition, 0.0, p_tail / n_rest)
        g[:, -1] = torch.where(partition, g[:, -1], 0.0)
    return f.sum(1), g - log_q.exp() * sum_g.unsqueeze(1), spread


def _soft_term(
    x: Tensor,
    top: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    partition: Tensor,
    order: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    *,
    divergence: str,
    missing: str,
    temperature: float,
    beta: float,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the divergence [C], the rows that have cells [C], and ∂divergence/∂x [C, V], x the logits over
    τ, top their maxima."""
    vocabulary, n_entries = x.shape[1], ids.shape[1]
    keys = torch.where(ids >= 0, ids, -1)
    if order is not None:
        assert low is not None
        assert high is not None
        one = high - low == 1
        ids = torch.where(one, order[torch.where(one, low, 0)].long(), ids)
        low, high = torch.where(one, 0, low), torch.where(one, 0, high)
        is_range = high > low
        keys = torch.where(is_range, (1 + low.long()) * (vocabulary + 1) + high, torch.where(ids >= 0, ids, -1))
    p, is_cell, owner = merge_duplicates(keys, torch.where(keys >= 0, logprobs.float(), float("-inf")).exp())

    # Sums over the cells, the tail last, each relative to its own maximum: 1 − Σ Q_k for the tail would
    # cancel.
    if order is None:
        active = is_cell.any(1, keepdim=True)
        slot = torch.where(active, ids.gather(1, owner), 0)
        x_slot = x.gather(1, slot)
        rest = x.scatter(1, slot, torch.where(active, float("-inf"), x_slot))
        shift = torch.cat([x_slot, rest.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)], 1)
        sums = torch.cat([is_cell.float(), torch.exp(rest - shift[:, -1:]).sum(1, keepdim=True)], 1)
        n_rest = vocabulary - is_cell.sum(1)
    else:
        cell = cell_of_tokens(ids, low, high, is_cell, order)
        shift = x.new_full((len(x), n_entries + 1), torch.finfo(torch.float32).min).scatter_reduce_(1, cell, x, "amax")
        e = torch.exp(x - shift.gather(1, cell))
        sums = torch.zeros_like(shift).scatter_add_(1, cell, e)
        n_tokens = torch.zeros_like(shift).scatter_add_(1, cell, torch.ones_like(x))
        # A range whose every token lies in smaller cells can hold no mass: the teacher's counts as missing.
        is_cell = is_cell & (n_tokens[:, :-1] > 0)
        p = torch.where(is_cell, p, 0.0)
        active, n_rest = is_cell.any(1, keepdim=True), n_tokens[:, -1]
        rest = torch.where(cell == n_entries, x, float("-inf"))
    log_sums = torch.where(sums > 0, shift - top + sums.log(), float("-inf"))
    sum_rest = torch.zeros_like(p[:, 0])
    flat = rest != float("-inf")
    if missing == "uniform":
        sum_rest = torch.where(flat, rest - top, 0.0).sum(1)
        n_rest = torch.where(partition, n_rest, flat.sum(1))
    soft, alpha, spread = soft_from_cells(
        log_sums, p, is_cell, partition, n_rest, sum_rest,
        divergence=divergence, missing=missing, temperature=temperature, beta=beta,
    )  # fmt: skip
    if not want_grad:
        return soft, active.squeeze(1), None

    per_e = alpha / sums.clamp(min=torch.finfo(torch.float32).tiny)
    if order is None:
        grad = torch.exp(rest - shift[:, -1:]).mul_(per_e[:, -1:]).sub_(torch.where(flat, spread.unsqueeze(1), 0.0))
        grad.scatter_(1, slot, torch.where(active, alpha[:, :-1].gather(1, owner), 0.0))
    else:
        grad = e.mul_(per_e.gather(1, cell)).sub_(torch.where(flat, spread.unsqueeze(1), 0.0))
    return soft, active.squeeze(1), grad
