"""The fusion loss by its definitions: dense, fp64, one row at a time, gradients by autograd. Slow and
obvious."""

from __future__ import annotations

import torch
from torch import Tensor

MASS_FLOOR = 1e-6


def make_rows(seed: int, n_rows: int, vocabulary: int, n_entries: int, *, scale: float = 3.0, shift: float = 0.0):
    """Return hostile rows: ignored labels, absent and duplicate ids, rows without a teacher, teachers summing
    above one."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_rows, vocabulary, generator=rng) * scale + shift
    labels = torch.randint(0, vocabulary, (n_rows,), generator=rng)
    labels[torch.rand(n_rows, generator=rng) < 0.2] = -100
    ids = torch.randint(0, vocabulary, (n_rows, n_entries), generator=rng)
    mass = torch.rand(n_rows, n_entries, generator=rng) + 1e-3
    share = 0.2 + 0.9 * torch.rand(n_rows, 1, generator=rng)
    logprobs = (mass / mass.sum(1, keepdim=True).clamp(min=1e-9) * share).clamp(max=1).log()
    ids[torch.rand(n_rows, n_entries, generator=rng) < 0.15] = -1
    if n_entries:
        ids[torch.rand(n_rows, generator=rng) < 0.1] = -1
        logprobs[torch.rand(n_rows, n_entries, generator=rng) < 0.05] = -float("inf")
        gold = torch.rand(n_rows, generator=rng) < 0.5
        ids[gold, 0] = labels.clamp(min=0)[gold]
    return logits, labels, ids, logprobs


def published(divergence: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Each divergence as its paper prints it, between two lists of masses."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.clamp(min=1e-300) / b).log(), 0.0).sum()

    mixture = beta * p + (1 - beta) * q
    if divergence == "ce":
        return -torch.where(p > 0, p * q.log(), 0.0).sum()
    if divergence == "kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p.clamp(min=MASS_FLOOR))
    if divergence == "jsd":
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    if divergence == "tvd":
        return (p - q).abs().sum() / 2
    if divergence == "skew_kl":
        return kl(p, mixture)
    if divergence == "alpha":
        return (beta * p + (1 - beta) * q - p**beta * q ** (1 - beta)).sum() / (beta * (1 - beta))
    raise AssertionError(divergence)


def partition_of(entries: list[frozenset[int]], masses: list[float]) -> dict[frozenset[int], float]:
    """Return disjoint cells and their masses: a token belongs to the smallest set that holds it, equal sets add up."""
    mass: dict[frozenset[int], float] = {}
    for entry, p in zip(entries, masses):
        mass[entry] = mass.get(entry, 0.0) + p
    cells: dict[frozenset[int], float] = {}
    taken: frozenset[int] = frozenset()
    for entry in sorted(mass, key=len):
        if entry - taken:
            cells[entry - taken] = mass[entry]
        taken |= entry
    return cells


def teacher(entries: list[frozenset[int]], logprobs: list[float], vocabulary: int, missing: str, temperature: float):
    """Return the row's cells as lists of tokens and their masses; the last cell is the tail."""
    masses = [float(torch.tensor(logprob, dtype=torch.float64).exp()) for logprob in logprobs]
    mass = partition_of(entries, masses)
    covered = frozenset().union(*mass)
    rest = [token for token in range(vocabulary) if token not in covered]
    p = torch.tensor([*mass.values(), max(0.0, 1.0 - sum(mass.values()))], dtype=torch.float64)
    if missing == "renormalise" or not rest:
        p[-1] = 0.0
    p = p / p.sum() if p.sum() > 0 else p
    p = p ** (1 / temperature)
    p = p / p.sum() if p.sum() > 0 else p
    return [sorted(cell) for cell in mass] + [rest], p


def row_loss(z: Tensor, label: int, ids, logprobs, hard_weight: float, partition: bool, options: dict) -> tuple:
    """Return loss, hard and soft of one row of fp64 logits, and whether fp32 can tell the gradient."""
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    vocabulary = z.shape[0]
    log_q = torch.log_softmax(z, 0)
    smoothing = options.get("label_smoothing", 0.0)
    hard = -(1 - smoothing) * log_q[label] - smoothing * log_q.mean()
    loss = hard_weight * hard + options.get("z_loss", 0.0) * torch.logsumexp(z, 0) ** 2
    soft = torch.zeros((), dtype=torch.float64)
    smooth = True
    if ids:
        missing = "tail" if partition else options.get("missing", "renormalise")
        divergence, tau = options.get("divergence", "ce"), options.get("student_temperature", 1.0)
        cells, p = teacher(ids, logprobs, vocabulary, missing, options.get("temperature", 1.0))
        log_q = torch.log_softmax(z / tau, 0)
        q = torch.stack([log_q[cell].exp().sum() for cell in cells])
        keep = slice(None, -1) if missing in ("zero", "uniform") or not cells[-1] else slice(None)
        soft = published(divergence, p[keep], q[keep], options.get("beta", 0.5))
        # |p − Q| has a kink, on whose side fp32 may find itself wrongly.
        smooth = divergence != "tvd" or not ((p > 0) & ((p - q).abs() < 1e-6))[keep].any()
        if missing == "uniform" and cells[-1]:
            share = p[-1] / len(cells[-1])
            soft = soft - share * log_q[cells[-1]].sum()
            if divergence == "kl" and share > 0:
                soft = soft + p[-1] * share.log()
        soft = soft * tau**2
        loss = loss + (1 - hard_weight) * soft
    return loss, hard, soft, smooth


def magnitudes(z: Tensor, label: int, ids, options: dict) -> Tensor:
    """Return the size of the terms whose sum is each element of the gradient: what rounding errors are
    relative to."""
    slope = torch.ones_like(z)
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
        slope = 1.0 - (z / options["softcap"]).square()
    tau, vocabulary = options.get("student_temperature", 1.0), z.shape[0]
    size = torch.softmax(z, 0) + tau * torch.softmax(z / tau, 0) + options.get("label_smoothing", 0.0) / vocabulary
    size += 1.0 / vocabulary if options.get("missing") == "uniform" else 0.0
    size += 2 * options.get("z_loss", 0.0) * torch.logsumexp(z, 0).abs() * torch.softmax(z, 0)
    size[[label, *(token for entry in ids if len(entry) == 1 for token in entry)]] += tau
    rest = sorted(set(range(vocabulary)).difference(*ids))
    if options.get("missing") == "tail" and rest:
        # The teacher's tail is 1 − Σ p, which in fp32 errs by some 10⁻⁷ however small it is.
        size[rest] += 0.1 * tau * torch.softmax(z[rest] / tau, 0)
    return size * slope


def entries_of(ids, logprobs, cells, row: int) -> tuple[list[frozenset[int]], list[float]]:
    """Return the row's present entries as sets of tokens, and their log-probabilities."""
    entries, kept = [], []
    for k, token in enumerate(ids[row].tolist()):
        low, high = (int(cells.low[row, k]), int(cells.high[row, k])) if cells is not None else (0, 0)
        if high > low:
            entries.append(frozenset(cells.order[low:high].tolist()))
        elif token >= 0:
            entries.append(frozenset([token]))
        else:
            continue
        kept.append(float(logprobs[row, k].double()))
    return entries, kept


def dense_loss(logits, labels, ids, logprobs, *, hard_weight, row_weight=None, partition=None, cells=None, **options):
    """Return the loss, its gradient and the size of the gradient's terms [N, V], hard and soft per row, all fp64."""
    z = logits.detach().double().requires_grad_(True)
    n_rows = z.shape[0]
    valid = [row for row in range(n_rows) if labels[row] != -100]
    total = z.sum() * 0.0
    hard, soft = torch.zeros(n_rows, dtype=torch.float64), torch.zeros(n_rows, dtype=torch.float64)
    size = torch.zeros_like(z)
    for row in valid:
        weight = 1.0 / len(valid) if row_weight is None else float(row_weight[row])
        share = float(hard_weight[row]) if isinstance(hard_weight, Tensor) else hard_weight
        in_cells = bool(partition[row]) if partition is not None else False
        label = int(labels[row])
        entries, kept = entries_of(ids, logprobs, cells, row)
        one, hard[row], soft[row], smooth = row_loss(z[row], label, entries, kept, share, in_cells, options)
        total = total + weight * one
        size[row] = weight * magnitudes(z[row].detach(), label, entries, options)
        if not smooth:
            size[row] = torch.inf
        if options.get("divergence") == "alpha":
            size[row] *= 1.0 + float(soft[row].detach())  # p^β Q^(1−β) has no bound for β > 1
    (gradient,) = torch.autograd.grad(total, z)
    return total.detach(), gradient, size, hard.detach(), soft.detach()
