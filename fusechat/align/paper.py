"""The research code's way from a warping path to rows (its default mode), for reproduction.

A pivot row is served by a source row when their strings look alike, whether or not the same text came before them:
the warp pairs 1 to 9 % of rows with distributions for another context. `bytes` is the default for that reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.align.statistics import PairCounts

ONE_HOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributed:
    """Rows in the pivot's ids, [Tp,K] (absent entries id 0, −inf), and which of them are one-hot, bool[Tp]."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float16]
    one_hot: npt.NDArray[np.bool_]


def branches(
    pivot_to_source: Sequence[Sequence[int]],
    source_tokens: Sequence[str],
    pivot_tokens: Sequence[str],
    *,
    source_mark: str,
    pivot_mark: str,
) -> npt.NDArray[np.int32]:
    """Return the source position whose row serves each pivot position, or ONE_HOT, int32[Tp].

    A single partner serves if either string ends with the other, the source's mark written as the pivot's. Of several,
    marks removed, the first that stands in that relation serves; else the last of those whose strings in order make up
    the pivot's. The research code then leaves a row empty whose partners' concatenation ends with the pivot's string,
    or the reverse, but that case cannot arise: the last partner alone would already stand in the relation.
    """
    out = np.empty(len(pivot_tokens), np.int32)
    for i, (partners, token) in enumerate(zip(pivot_to_source, pivot_tokens, strict=True)):
        if len(partners) == 1:
            text = source_tokens[partners[0]].replace(source_mark, pivot_mark)
            out[i] = partners[0] if _suffix_related(text, token) else ONE_HOT
            continue
        bare = token.replace(pivot_mark, "")
        texts = [source_tokens[j].replace(source_mark, "") for j in partners]
        related = next((j for j, text in zip(partners, texts, strict=True) if _suffix_related(text, bare)), None)
        if related is not None:
            out[i] = related
            continue
        whole = _concatenation(partners, texts, bare)
        out[i] = ONE_HOT if whole is None else whole
    return out


def _suffix_related(a: str, b: str) -> bool:
    return a.endswith(b) or b.endswith(a)


def _concatenation(partners: Sequence[int], texts: Sequence[str], token: str) -> int | None:
    """Return the last partner of a greedy walk through `token`, if the walk reaches its end."""
    position, last = 0, None
    for j, text in zip(partners, texts, strict=True):
        if token.startswith(text, position):
            position += len(text)
            last = j
    return last if position == len(token) else None


def distribute(
    pivot_to_source: Sequence[Sequence[int]],
    source_tokens: Sequence[str],
    pivot_tokens: Sequence[str],
    *,
    source_mark: str,
    pivot_mark: str,
    target: npt.NDArray[np.integer[Any]],
    ids: npt.NDArray[np.integer[Any]],
    logprobs: npt.NDArray[np.floating[Any]],
    next_ids: npt.NDArray[np.integer[Any]],
) -> Distributed:
    """Carry top-k source rows, [Ts,K], over to the pivot's positions by the research code's default branches.

    `target` [Vs] is the pivot id of every source id (`vocab_map(..., "ms-upstream")`; −1: none), `next_ids` [Tp] the
    token after each pivot position, which one-hot rows carry. Candidates keep their order and values; of several on one
    pivot id the first stays.
    """
    chosen = branches(pivot_to_source, source_tokens, pivot_tokens, source_mark=source_mark, pivot_mark=pivot_mark)
    out_ids = np.zeros((len(chosen), ids.shape[1]), np.int32)
    out = np.full(out_ids.shape, -np.inf, np.float16)
    for i, j in enumerate(chosen.tolist()):
        if j == ONE_HOT:
            out_ids[i, 0], out[i, 0] = next_ids[i], 0.0
        elif j >= 0:
            present = ~np.isneginf(logprobs[j])
            to = target[ids[j][present]]
            kept, first = np.unique(to, return_index=True)
            first = np.sort(first[kept >= 0])
            out_ids[i, : len(first)], out[i, : len(first)] = to[first], logprobs[j][present][first]
    return Distributed(ids=out_ids, logprobs=out, one_hot=chosen == ONE_HOT)


def paired_ids(
    ranges: npt.NDArray[np.int32], source_ids: npt.NDArray[np.int32], pivot_ids: npt.NDArray[np.int32]
) -> PairCounts:
    """Count which source ids stood against which pivot ids; an id twice against one position counts once."""
    lengths = ranges[:, 1] - ranges[:, 0] + 1
    position = np.repeat(np.arange(len(ranges)), lengths)
    within = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = source_ids[np.repeat(ranges[:, 0], lengths) + within].astype(np.int64)
    position, source = np.unique(np.stack([position, source]), axis=1)
    return PairCounts.of(source, pivot_ids[position].astype(np.int64))
