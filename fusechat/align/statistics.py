"""Which tokens stood against each other in a corpus, counted sparsely, and the vocabulary maps made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusechat.align.backend import engine

SOFT_TARGETS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCounts:
    """How often source token `source` stood against pivot token `pivot`: sorted by both, each pair once.

    `source` and `pivot` int64[N], `count` int64[N]; memory grows with the pairs seen, not with the vocabularies.
    """

    source: npt.NDArray[np.int64]
    pivot: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]

    @classmethod
    def of(cls, source: npt.NDArray[np.int64], pivot: npt.NDArray[np.int64]) -> PairCounts:
        """Count the pairs (source[i], pivot[i])."""
        keys, count = np.unique(source << 32 | pivot, return_counts=True)
        return cls(source=keys >> 32, pivot=keys & 0xFFFFFFFF, count=count)

    def __add__(self, other: PairCounts) -> PairCounts:
        keys, place = np.unique(
            np.concatenate([self.source << 32 | self.pivot, other.source << 32 | other.pivot]), return_inverse=True
        )
        count = np.zeros(len(keys), np.int64)
        np.add.at(count, place, np.concatenate([self.count, other.count]))
        return PairCounts(source=keys >> 32, pivot=keys & 0xFFFFFFFF, count=count)


def no_counts() -> PairCounts:
    """Return counts of nothing."""
    return PairCounts.of(np.empty(0, np.int64), np.empty(0, np.int64))


def best_pairs(
    counts: PairCounts, source_texts: Sequence[str], pivot_texts: Sequence[str], size: int
) -> npt.NDArray[np.int32]:
    """Return every source id's most frequent partner, int32[size]: least edit distance, then lowest id, among equals.

    −1 for source ids without a pair. Texts are by id.
    """
    distance = _distances(counts, source_texts, pivot_texts)
    order = np.lexsort((counts.pivot, distance, -counts.count, counts.source))
    return _first_of_each(counts, order, size)


def soft_pairs(counts: PairCounts, size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return every source id's SOFT_TARGETS most frequent partners and their shares, [size, SOFT_TARGETS].

    Absent targets are −1 with weight 0; the weights of an id with any pair sum to 1.
    """
    order = np.lexsort((counts.pivot, -counts.count, counts.source))
    source, pivot, count = counts.source[order], counts.pivot[order], counts.count[order]
    begins = np.flatnonzero(np.diff(source, prepend=-1))
    rank = np.arange(len(source)) - np.repeat(begins, np.diff(np.append(begins, len(source))))
    kept = rank < SOFT_TARGETS
    target = np.full((size, SOFT_TARGETS), -1, np.int32)
    weight = np.zeros((size, SOFT_TARGETS), np.float64)
    target[source[kept], rank[kept]] = pivot[kept]
    weight[source[kept], rank[kept]] = count[kept]
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1)
    return target, weight.astype(np.float32)


def upstream_pairs(
    counts: PairCounts,
    source_pieces: Sequence[str],
    pivot_pieces: Sequence[str],
    *,
    source_mark: str,
    pivot_mark: str,
    size: int,
) -> npt.NDArray[np.int32]:
    """Return every source id's partner by the research code's score, int32[size]; −1 for ids without a pair.

    The score is distance · sigmoid(count), times 0.1 where one piece contains the other, and the lowest wins, the
    lowest id among equals: it prefers *rare* pairs, and is here for parity. Pieces lose their word mark; where either
    becomes empty, the source's mark becomes the pivot's instead and the pivot's piece stays as it is.
    """
    source, pivot = [], []
    for s, p in zip(counts.source.tolist(), counts.pivot.tolist(), strict=True):
        a, b = source_pieces[s].replace(source_mark, ""), pivot_pieces[p].replace(pivot_mark, "")
        if not a or not b:
            a, b = source_pieces[s].replace(source_mark, pivot_mark), pivot_pieces[p]
        source.append(a)
        pivot.append(b)
    distance = engine().edit_distances(source, pivot).astype(np.float64)
    contained = np.array([a in b or b in a for a, b in zip(source, pivot, strict=True)], np.bool_)
    distance = np.where(contained, distance * 0.1, distance)
    score = distance * (1.0 / (1.0 + np.exp(-counts.count.astype(np.float64))))
    return _first_of_each(counts, np.lexsort((counts.pivot, score, counts.source)), size)


def _distances(counts: PairCounts, source_texts: Sequence[str], pivot_texts: Sequence[str]) -> npt.NDArray[np.int32]:
    source = [source_texts[i] for i in counts.source.tolist()]
    pivot = [pivot_texts[i] for i in counts.pivot.tolist()]
    distances: npt.NDArray[np.int32] = engine().edit_distances(source, pivot)
    return distances


def _first_of_each(counts: PairCounts, order: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int32]:
    source = counts.source[order]
    first = order[np.flatnonzero(np.diff(source, prepend=-1))]
    out = np.full(size, -1, np.int32)
    out[counts.source[first]] = counts.pivot[first]
    return out
