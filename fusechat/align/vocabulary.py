"""Vocabulary maps: which pivot token takes the mass of each source token (design: vocabulary map)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.align.backend import engine
from fusechat.align.statistics import PairCounts, best_pairs, soft_pairs, upstream_pairs
from fusechat.bytetable import ByteTable, Role
from fusechat.errors import ConfigError

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Tokenizes texts as the continuation of a text: without special tokens, and without a dummy space in front."""


class Quality(enum.IntEnum):
    """How well an entry of a map stands for its source token."""

    LOST = 0
    EXACT = 1
    APPROXIMATE = 2


METHODS = ("exact", "mined", "ms", "ms-soft", "ms-upstream", "prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabMap:
    """Where each source token's mass goes.

    `target` int32[Vs,m] holds pivot ids (−1: none), `weight` float32[Vs,m] their shares, m = 1 but for `ms-soft`;
    `quality` uint8[Vs] a Quality. Stacked maps have one axis more in front.
    """

    target: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]
    quality: npt.NDArray[np.uint8]


def stack_maps(maps: Sequence[VocabMap]) -> VocabMap:
    """Return several maps as one [M,Vs,m], the narrower ones padded with absent targets."""
    width = max(m.target.shape[1] for m in maps)

    def padded(array: npt.NDArray[Any], fill: int) -> npt.NDArray[Any]:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

    return VocabMap(
        target=np.stack([padded(m.target, -1) for m in maps]),
        weight=np.stack([padded(m.weight, 0) for m in maps]),
        quality=np.stack([m.quality for m in maps]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """What only `ms-upstream` asks of a vocabulary: its pieces as strings by id, its word mark and its special ids."""

    pieces: Sequence[str]
    mark: str
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None


def vocab_map(
    source: ByteTable,
    pivot: ByteTable,
    method: str = "prefix",
    *,
    counts: PairCounts | None = None,
    pivot_encode: Encode | None = None,
    source_spelling: Spelling | None = None,
    pivot_spelling: Spelling | None = None,
    source_lead: bytes = b"",
    pivot_lead: bytes = b"",
    pivot_end: int | None = None,
    prefix: VocabMap | None = None,
    threads: int = 1,
) -> VocabMap:
    """Map every source id to pivot ids.

    `exact`: byte twins only. `prefix`: a token without twin gives its mass to the first token of its bytes in the
    pivot's own tokenization, for which `pivot_encode` is asked; without it, or where the pivot's tokenizer does not
    spell the bytes (no UTF-8, normalised text), the longest pivot token the bytes begin with stands in.
    `mined`: byte twin, else the pivot token at least edit distance. `ms`: byte twin, else the partner it most often
    has in `counts`. `ms-soft`: byte twin, else its four most frequent partners by their shares. Tokens that `counts`
    has not seen fall back to `prefix`, which is made unless it is given. `ms-upstream`: the research code's map, which
    needs both spellings.
    Ends of turns and of sequences map to `pivot_end`, the token that ends the pivot's turns (without it, to the first
    of its vocabulary with that role), other specials to a special of the same spelling.
    With leads, tokens stand for their bytes after `source_lead` was cut and `pivot_lead` put in front: a turn's first
    token may carry a dummy space in one tokenizer and none in the other.
    Raises ConfigError for an unknown method, and for one whose counts or spellings are missing.
    """
    if method not in METHODS:
        raise ConfigError(f"vocabulary map {method!r} is not one of {', '.join(METHODS)}")
    if method.startswith("ms") and counts is None:
        raise ConfigError(f"the vocabulary map {method} needs `counts`, the pairs of a corpus")
    if method == "ms-upstream":
        if source_spelling is None or pivot_spelling is None:
            raise ConfigError("the vocabulary map ms-upstream needs both vocabularies' spellings")
        assert counts is not None
        return _upstream(counts, source_spelling, pivot_spelling)
    target = np.full(len(source), -1, np.int32)
    twins = _by_bytes(pivot, Role.TEXT)
    without_twin: dict[int, bytes] = {}
    source_tokens = source.tokens()
    for token_id in np.flatnonzero(source.roles == Role.TEXT).tolist():
        data = pivot_lead + source_tokens[token_id].removeprefix(source_lead)
        twin = twins.get(data)
        if twin is not None:
            target[token_id] = twin
        elif data:
            without_twin[token_id] = data
    _map_specials(source, pivot, target, end_by_role(pivot) if pivot_end is None else pivot_end)
    exact = target >= 0
    targets, weights = target[:, None], exact.astype(np.float32)[:, None]
    if counts is not None and method == "ms-soft":
        soft, share = soft_pairs(counts, len(source))
        soft[exact] = -1
        share[exact] = 0
        soft[exact, 0] = target[exact]
        share[exact, 0] = 1
        targets, weights = soft, share
    elif counts is not None and method == "ms":
        texts = [[_loose_text(token) for token in table.tokens()] for table in (source, pivot)]
        best = best_pairs(counts, texts[0], texts[1], len(source))
        targets = np.where(exact, target, best)[:, None]
    missing = {i: data for i, data in without_twin.items() if targets[i, 0] < 0}
    if method == "mined":
        targets[list(missing), 0] = _nearest(list(missing.values()), twins, threads)
    elif prefix is not None:
        targets[list(missing), 0] = prefix.target[list(missing), 0]
    elif method != "exact":
        targets[list(missing), 0] = _first_tokens(list(missing.values()), pivot, twins, pivot_encode)
    weights[list(missing), 0] = 1
    if method == "ms":
        weights[:] = 1
    found = targets[:, 0] >= 0
    quality = np.where(exact, Quality.EXACT, np.where(found, Quality.APPROXIMATE, Quality.LOST)).astype(np.uint8)
    return VocabMap(target=targets, weight=weights, quality=quality)


def _upstream(counts: PairCounts, source: Spelling, pivot: Spelling) -> VocabMap:
    target = upstream_pairs(
        counts,
        source.pieces,
        pivot.pieces,
        source_mark=source.mark,
        pivot_mark=pivot.mark,
        size=len(source.pieces),
    )
    unseen = pivot.unk_id if pivot.unk_id is not None else pivot.eos_id
    if unseen is not None:
        target[target < 0] = unseen
    for s, p in ((source.bos_id, pivot.bos_id), (source.eos_id, pivot.eos_id)):
        if s is not None and p is not None:
            target[s] = p
    # A candidate whose piece the pivot has, under its own mark, goes there before any statistics.
    by_piece = {piece: i for i, piece in enumerate(pivot.pieces) if piece}
    quality = np.where(target >= 0, Quality.APPROXIMATE, Quality.LOST).astype(np.uint8)
    for i, piece in enumerate(source.pieces):
        twin = by_piece.get(piece.replace(source.mark, pivot.mark)) if piece else None
        if twin is not None:
            target[i], quality[i] = twin, Quality.EXACT
    return VocabMap(target=target[:, None], weight=np.ones((len(target), 1), np.float32), quality=quality)


def end_by_role(table: ByteTable) -> int | None:
    """Return the first id whose role is to end a turn, else to end a sequence, else None.

    Only a text tells which of several does: Llama-3.1 has <|eom_id|> before <|eot_id|>.
    """
    for role in (Role.TURN, Role.EOS):
        ids = np.flatnonzero(table.roles == role)
        if len(ids):
            return int(ids[0])
    return None


def _by_bytes(table: ByteTable, role: Role) -> dict[bytes, int]:
    # Where two tokens share their bytes the later one wins: a byte token <0x41> precedes the piece "A", an added token
    # follows the piece it replaces, and in both cases the tokenizer itself emits the later.
    tokens = table.tokens()
    return {tokens[i]: i for i in np.flatnonzero(table.roles == role).tolist()}


def _map_specials(source: ByteTable, pivot: ByteTable, target: npt.NDArray[np.int32], end: int | None) -> None:
    if end is not None:
        target[np.isin(source.roles, (Role.EOS, Role.TURN))] = end
    bos = np.flatnonzero(pivot.roles == Role.BOS)
    if len(bos):
        target[source.roles == Role.BOS] = bos[0]
    others = _by_bytes(pivot, Role.OTHER)
    for token_id in np.flatnonzero(source.roles == Role.OTHER).tolist():
        target[token_id] = others.get(source.token(token_id), -1)


def _first_tokens(
    items: list[bytes], pivot: ByteTable, twins: dict[bytes, int], encode: Encode | None
) -> npt.NDArray[np.int32]:
    longest = max((len(token) for token in twins), default=0)
    firsts = np.full(len(items), -1, np.int32)
    if encode is not None:
        spelled = [(i, text) for i, text in enumerate(map(_text, items)) if text is not None]
        tokens, is_text = pivot.tokens(), (pivot.roles == Role.TEXT).tolist()
        for (i, _), ids in zip(spelled, encode([text for _, text in spelled]), strict=True):
            if ids and is_text[ids[0]] and _is_prefix(tokens[ids[0]], items[i]):
                firsts[i] = ids[0]
    for i in np.flatnonzero(firsts < 0).tolist():
        data = items[i]
        for n in range(min(len(data), longest), 0, -1):
            if data[:n] in twins:
                firsts[i] = twins[data[:n]]
                break
    return firsts


def _nearest(items: list[bytes], twins: dict[bytes, int], threads: int) -> npt.NDArray[np.int32]:
    tokens = sorted(twins, key=lambda token: twins[token])
    index, _ = engine().nearest([_loose_text(d) for d in items], [_loose_text(t) for t in tokens], threads)
    ids = np.array([twins[t] for t in tokens], np.int32)
    return np.where(index >= 0, ids[index], np.int32(-1)) if len(ids) else np.full(len(items), -1, np.int32)


def _is_prefix(token: bytes, data: bytes) -> bool:
    return bool(token) and data.startswith(token)


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _loose_text(data: bytes) -> str:
    # Bytes that are no UTF-8 become one character each, so that distances count them once.
    return data.decode("utf-8", "surrogateescape")
