"""What bench/align.py compares with, written plainly; without torch, whose size would hide the stage's own memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


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
