"""Which candidate teaches how much of a row: the pivot's own distribution, or a source's.

With `min_ce` the candidate with the lowest cross-entropy on the text teaches all of it (arXiv 2408.07990, §3.2; ties go
to the pivot), with `avg_ce` all teach by exp(−cross-entropy), with `weighted` by weights of the user's, and with
`source` the sources teach whatever the pivot knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fusechat.train.source import Source
from fusechat.train.targets import Array

PIVOT = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """How candidates are compared."""

    rule: Literal["min_ce", "avg_ce", "source", "weighted"] = "min_ce"
    unit: Literal["sequence", "turn", "token"] = "sequence"
    """What is decided as one."""
    ce_unit: Literal["byte", "token"] = "byte"
    """What a cross-entropy is per: tokenizers with more, smaller tokens look better per token."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """`weighted`: by source's name, and `pivot`; 1 for those not named."""


def dialogue_weights(
    sources: Sequence[Source],
    totals: Sequence[Mapping[int, tuple[float, ...]]],
    dialogues: Sequence[int],
    how: Selection,
) -> Array:
    """Return each candidate's weight in each dialogue, float32[1 + sources, D], the pivot first; columns sum to one.

    `totals` are the sources'. A source that lacks a dialogue has weight 0 there. Compared are the texts that both
    encoded. Without a source there is nothing to compare.
    """
    if not sources:
        return np.ones((1, len(dialogues)), np.float32)
    shape = 1 + len(sources), len(dialogues)
    gain, known = np.zeros(shape), np.zeros(shape, dtype=np.bool_)
    pivot_nll = np.zeros(len(dialogues))
    known[PIVOT] = True
    for c, known_totals in enumerate(totals, 1):
        for i, dialogue in enumerate(dialogues):
            if dialogue not in known_totals:
                continue
            nll, own_nll, tokens, own_tokens, n_bytes = known_totals[dialogue]
            known[c, i] = True
            counts = (n_bytes, n_bytes) if how.ce_unit == "byte" else (tokens, own_tokens)
            ce, own_ce = (value / max(count, 1) for value, count in zip((nll, own_nll), counts))
            # Every source is compared with the pivot on what the two have in common, which may differ.
            gain[c, i] = own_ce - ce
            pivot_nll[i] = own_ce
    return _weights(np.where(known, gain - pivot_nll, -np.inf), known, sources, how)


def row_weights(sources: Sequence[Source], gold: Array, pivot: Mapping[str, Array], how: Selection) -> Array:
    """Return each candidate's weight at each row of a dialogue, float32[1 + sources, R], decided by turn or token.

    `gold` float32[1 + sources, R] are the log-probabilities of the rows' tokens, the pivot's first, NaN where a source
    has none: there it neither gains nor loses against the pivot.
    """
    known = np.isfinite(gold)
    if how.unit == "token" and how.rule != "avg_ce":  # a row's size divides all its candidates alike
        return _weights(np.where(known, gold, -np.inf), known, sources, how)
    predicted = np.flatnonzero(pivot["token.loss_mask"][1:]) + 1
    turn, end = pivot["token.turn"], pivot["token.byte_end"]
    size = np.ones(gold.shape[1], np.float32)
    if how.ce_unit == "byte":
        width = end.copy()
        width[1:] -= np.where(turn[1:] == turn[:-1], end[:-1], 0)
        size = np.maximum(width[predicted], 0).astype(np.float32)
    if how.unit == "token":  # a token of no byte, such as the end of a turn, counts as one
        return _weights(np.where(known, gold, -np.inf) / np.maximum(size, 1), known, sources, how)
    starts = np.flatnonzero(np.diff(turn[predicted], prepend=-1))  # a turn is a run of tokens
    if not len(starts):
        return np.zeros(gold.shape, np.float32)
    total = np.add.reduceat(np.where(known, gold, gold[PIVOT]), starts, axis=1, dtype=np.float64)
    score = total / np.maximum(np.add.reduceat(size, starts), np.finfo(np.float32).tiny)
    score[~np.logical_or.reduceat(known, starts, axis=1)] = -np.inf
    return _weights(np.repeat(score, np.diff(starts, append=len(predicted)), axis=1), known, sources, how)


def first_best(score: Array) -> Array:
    """Return the candidate of the highest score in each column of float[C, N], int64[N]; ties go to the first."""
    best, top = np.zeros(score.shape[1], np.int64), score[0]
    for c in range(1, len(score)):
        best[score[c] > top] = c
        top = np.maximum(top, score[c])
    return best


def _weights(score: Array, known: Array, sources: Sequence[Source], how: Selection) -> Array:
    """Return weights float32[C, N] from negative cross-entropies, −inf for candidates that are out.

    `known` bool[C, N] says which can teach; where the best cannot, all is the pivot's.
    """
    candidates = np.arange(len(score))[:, None]
    if how.rule == "min_ce":
        weights = candidates == first_best(score)
    elif how.rule == "source":
        weights = candidates == first_best(score[1:]) + 1
    elif how.rule == "weighted":
        asked = [how.weights.get(name, 1.0) for name in ("pivot", *(s.name for s in sources))]
        weights = np.broadcast_to(np.array(asked)[:, None], score.shape)
    else:
        weights = np.exp(score - score.max(axis=0))
    weights = np.where(known, weights, np.float32(0.0))
    total = weights.sum(axis=0)
    nobody = total <= 0
    if nobody.any():
        weights[PIVOT, nobody] = total[nobody] = 1.0
    shares: Array = (weights / total).astype(np.float32)
    return shares
