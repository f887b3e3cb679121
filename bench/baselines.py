"""What the benchmarks compare with, written plainly: what one would write first, and what the research code does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def gather_loss(logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, hard_weight: float) -> Tensor:
    """Compute the fusion loss by gathering from log-softmax's parts; autograd does the rest."""
    p = torch.softmax(logprobs, 1)
    lse = torch.logsumexp(logits.float(), 1)
    hard = lse - logits.gather(1, labels.unsqueeze(1)).squeeze(1).float()
    soft = lse - (p * logits.gather(1, ids).float()).sum(1)
    return (hard_weight * hard + (1.0 - hard_weight) * soft).mean()


def collate_dense(ids: Tensor, logits: Tensor, vocabulary: int) -> Tensor:
    """Build a dense bf16 target [B, S, V] from [B, S, K] entries, sequence by sequence, as the research code does."""
    targets = []
    for sequence_ids, sequence_logits in zip(ids, logits):
        mass = torch.softmax(sequence_logits.float(), -1).to(torch.bfloat16)
        target = torch.zeros(sequence_ids.shape[0], vocabulary, dtype=torch.bfloat16)
        targets.append(target.scatter_(-1, sequence_ids, mass))
    return torch.stack(targets)


def dense_loss(
    logits: Tensor, labels: Tensor, pivot: Tensor, source: Tensor, metric: Tensor, hard_weight: float
) -> Tensor:
    """Compute the research code's loss: choose between two dense targets by reward, element by element.

    logits, pivot and source are [B, S, V], metric [B, 2] the two distributions' cross-entropies of each sequence.
    """
    reward = torch.exp(-metric.to(torch.bfloat16))
    rewards = torch.stack([reward[:, i].view(-1, 1, 1).expand_as(pivot) for i in range(2)], -1)
    index = torch.argmax(rewards, -1, keepdim=True)
    target = torch.stack([pivot, source], -1).gather(-1, index).squeeze(-1)
    flat = logits.view(-1, logits.shape[-1])
    hard = F.cross_entropy(flat, labels.view(-1))
    soft = F.cross_entropy(flat, target.view(-1, target.shape[-1]).to(flat.dtype))
    return hard_weight * hard + (1.0 - hard_weight) * soft


def plain_dtw(
    source: list[str], pivot: list[str], source_mark: str, pivot_mark: str
) -> tuple[int, list[tuple[int, int]]]:
    """Warp two token sequences as the research code does: a Python loop over the cells of a NumPy matrix.

    The distance of a pair of strings is looked up after its first use, which the research code does not do: it calls a
    C library for every cell.
    """
    known: dict[tuple[str, str], int] = {}

    def cost(a: str, b: str) -> int:
        if (a, b) not in known:
            bare_a, bare_b = a.replace(source_mark, ""), b.replace(pivot_mark, "")
            if not bare_a or not bare_b:
                bare_a, bare_b = a.replace(source_mark, pivot_mark), b
            known[a, b] = plain_edit_distance(bare_a, bare_b)
        return known[a, b]

    n, m = len(source), len(pivot)
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for i in range(n):
        for j in range(m):
            total[i + 1, j + 1] = cost(source[i], pivot[j]) + min(total[i, j + 1], total[i + 1, j], total[i, j])
    i, j = n, m
    path = []
    while i and j:
        path.append((i - 1, j - 1))
        step = int(np.argmin([total[i - 1, j - 1], total[i, j - 1], total[i - 1, j]]))
        i, j = [(i - 1, j - 1), (i, j - 1), (i - 1, j)][step]
    return int(total[n, m]), path[::-1]


def plain_edit_distance(a: str, b: str) -> int:
    """Compute the Levenshtein distance with one row of the matrix at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def plain_match(pivot_ends: list[int], source_ends: list[int]) -> list[int]:
    """Return for every pivot token the source token that ends at the same byte, or −1, through a dictionary."""
    place = {end: i for i, end in enumerate(source_ends)}
    return [place.get(end, -1) for end in pivot_ends]


def plain_remap(ids: Any, logprobs: Any, target: Any) -> list[dict[int, float]]:
    """Carry top-k rows through a map, adding what collides: {pivot id: probability} for every row."""
    rows = []
    for row_ids, row_logprobs in zip(ids.tolist(), logprobs.tolist()):
        row: dict[int, float] = {}
        for token, logprob in zip(row_ids, row_logprobs):
            to = int(target[token])
            if to >= 0:
                row[to] = row.get(to, 0.0) + math.exp(logprob)
        rows.append(row)
    return rows
