"""Which candidate teaches how much of a row: the pivot's own distribution, or a source's.

With `min_ce` the candidate with the lowest cross-entropy on the text teaches all of it (arXiv 2408.07990, §3.2; ties go
to the pivot), with `avg_ce` all teach by exp(−cross-entropy), with `weighted` by weights of the user's, and with
`source` the sources teach whatever the pivot knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import torch

from fusechat.loss.choice import Choice, candidate_weights
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
    """Return each candidate's weight in each dialogue, float32[D, 1 + sources], the pivot first; rows sum to one.

    `totals` are the sources'. A source that lacks a dialogue has weight 0 there. Compared are the texts that both
    encoded.
    """
    n, n_candidates = len(dialogues), 1 + len(sources)
    gain = np.zeros((n, n_candidates))
    pivot_nll, size = np.zeros(n), np.ones(n)
    known = np.zeros((n, n_candidates), dtype=np.bool_)
    known[:, PIVOT] = True
    for c, known_totals in enumerate(totals, 1):
        for i, dialogue in enumerate(dialogues):
            if dialogue not in known_totals:
                continue
            nll, own_nll, tokens, own_tokens, n_bytes = known_totals[dialogue]
            known[i, c] = True
            counts = (n_bytes, n_bytes) if how.ce_unit == "byte" else (tokens, own_tokens)
            ce, own_ce = (value / max(count, 1) for value, count in zip((nll, own_nll), counts))
            # Every source is compared with the pivot on what the two have in common, which may differ.
            gain[i, c] = own_ce - ce
            pivot_nll[i] = own_ce
    return _weights(-pivot_nll[:, None] + gain, np.arange(n), n, size, known, sources, how)


def row_weights(
    sources: Sequence[Source], dialogue: int, pivot: Mapping[str, Array], have: Array, how: Selection
) -> Array:
    """Return each candidate's weight at each row of a dialogue, float32[R, 1 + sources], decided by turn or token.

    `have` bool[sources] says which sources have the dialogue. Where a source has no probability for a row's token, it
    neither gains nor loses against the pivot.
    """
    mask = pivot["token.loss_mask"]
    own = pivot["row.gold_logprob"].astype(np.float64)
    gold = np.stack(
        [own, *(s.gold_logprob(dialogue) if h else np.full_like(own, np.nan) for s, h in zip(sources, have))], 1
    )
    known = np.isfinite(gold)
    predicted = np.flatnonzero(mask[1:]) + 1
    turn, end = pivot["token.turn"], pivot["token.byte_end"]
    size = np.ones(len(own))
    if how.ce_unit == "byte":
        begin = np.where(turn[predicted - 1] == turn[predicted], end[predicted - 1], 0)
        size = np.maximum(end[predicted] - begin, 0).astype(np.float64)
    unit = np.arange(len(own)) if how.unit == "token" else np.unique(turn[predicted], return_inverse=True)[1]
    if how.unit == "token":
        size = np.maximum(size, 1)  # a token of no byte, such as the end of a turn, counts as one
    gold = np.where(known, gold, gold[:, :1])
    return _weights(gold, unit, int(unit.max(initial=-1)) + 1, size, known, sources, how)


def _weights(
    gold: Array, unit: Array, n_units: int, size: Array, known: Array, sources: Sequence[Source], how: Selection
) -> Array:
    if how.rule in ("source", "weighted"):
        asked = [0.0] + [1.0] * len(sources)
        if how.rule == "weighted":
            asked = [how.weights.get(name, 1.0) for name in ("pivot", *(s.name for s in sources))]
        weights = np.where(known, np.array(asked), 0.0)
        if how.rule == "source" and len(sources) > 1:  # the best of them
            weights = np.zeros_like(weights)
            best = _compared(np.where(known, gold, -1e9)[:, 1:], unit, n_units, size, "min_ce")
            weights[:, 1:] = np.where(known[:, 1:], best, 0.0)
    else:
        weights = _compared(gold, unit, n_units, size, cast("Choice", how.rule))
        weights = np.where(known, weights, 0.0)
    total = weights.sum(1, keepdims=True)
    only_pivot = np.zeros_like(weights)
    only_pivot[:, PIVOT] = 1.0
    return np.where(total > 0, weights / np.where(total > 0, total, 1.0), only_pivot).astype(np.float32)


def _compared(gold: Array, unit: Array, n_units: int, size: Array, choice: Choice) -> Array:
    return candidate_weights(
        torch.from_numpy(np.ascontiguousarray(gold)),
        torch.from_numpy(unit.astype(np.int64)),
        choice=choice,
        n_units=n_units,
        size=torch.from_numpy(size),
    ).numpy()
