"""Vocabulary maps: which pivot token takes the mass of each source token (design: vocabulary map)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusechat.bytetable import ByteTable, Role
from fusechat.errors import ConfigError

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Tokenizes texts as the continuation of a text: without special tokens, and without a dummy space in front."""


class Quality(enum.IntEnum):
    """How well an entry of a map stands for its source token."""

    LOST = 0
    EXACT = 1
    APPROXIMATE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabMap:
    """`target` int32[Vs], the pivot id for every source id (−1: none), and its `quality` uint8[Vs]."""

    target: npt.NDArray[np.int32]
    quality: npt.NDArray[np.uint8]


def vocab_map(
    source: ByteTable,
    pivot: ByteTable,
    method: str = "prefix",
    *,
    pivot_encode: Encode | None = None,
    source_lead: bytes = b"",
    pivot_lead: bytes = b"",
) -> VocabMap:
    """Map every source id to a pivot id.

    `exact`: byte twins only. `prefix`: a token without twin gives its mass to the first token of its bytes in the
    pivot's own tokenization, for which `pivot_encode` is asked; without it, or where the pivot's tokenizer does not
    spell the bytes (no UTF-8, normalised text), the longest pivot token the bytes begin with stands in.
    Ends of turns and of sequences map to the pivot's end of turn, other specials to a special of the same spelling.
    With leads, tokens stand for their bytes after `source_lead` was cut and `pivot_lead` put in front: a turn's first
    token may carry a dummy space in one tokenizer and none in the other. Raises ConfigError for an unknown method.
    """
    if method not in ("exact", "prefix"):
        raise ConfigError(f"vocabulary map {method!r} is not one of exact, prefix")
    target = np.full(len(source), -1, np.int32)
    twins = _by_bytes(pivot, Role.TEXT)
    without_twin: list[tuple[int, bytes]] = []
    for token_id in np.flatnonzero(source.roles == Role.TEXT).tolist():
        data = pivot_lead + source.token(token_id).removeprefix(source_lead)
        twin = twins.get(data)
        if twin is not None:
            target[token_id] = twin
        elif data:
            without_twin.append((token_id, data))
    _map_specials(source, pivot, target)
    quality = np.where(target >= 0, Quality.EXACT, Quality.LOST).astype(np.uint8)
    if method == "prefix" and without_twin:
        firsts = _first_tokens([data for _, data in without_twin], pivot, twins, pivot_encode)
        for (token_id, _), first in zip(without_twin, firsts, strict=True):
            if first is not None:
                target[token_id], quality[token_id] = first, Quality.APPROXIMATE
    return VocabMap(target=target, quality=quality)


def end_of_turn(table: ByteTable) -> int | None:
    """Return the id that ends a turn in this vocabulary: its turn separator, else its end of sequence, else None."""
    for role in (Role.TURN, Role.EOS):
        ids = np.flatnonzero(table.roles == role)
        if len(ids):
            return int(ids[0])
    return None


def _by_bytes(table: ByteTable, role: Role) -> dict[bytes, int]:
    # Where two tokens share their bytes the later one wins: a byte token <0x41> precedes the piece "A", an added token
    # follows the piece it replaces, and in both cases the tokenizer itself emits the later.
    return {table.token(i): i for i in np.flatnonzero(table.roles == role).tolist()}


def _map_specials(source: ByteTable, pivot: ByteTable, target: npt.NDArray[np.int32]) -> None:
    end = end_of_turn(pivot)
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
) -> list[int | None]:
    longest = max((len(token) for token in twins), default=0)

    def longest_prefix(data: bytes) -> int | None:
        return next((twins[data[:n]] for n in range(min(len(data), longest), 0, -1) if data[:n] in twins), None)

    firsts: list[int | None] = [None] * len(items)
    if encode is not None:
        spelled = [(i, text) for i, text in enumerate(map(_text, items)) if text is not None]
        for (i, _), ids in zip(spelled, encode([text for _, text in spelled]), strict=True):
            if ids and pivot.roles[ids[0]] == Role.TEXT and _is_prefix(pivot.token(ids[0]), items[i]):
                firsts[i] = int(ids[0])
    return [longest_prefix(data) if first is None else first for data, first in zip(items, firsts, strict=True)]


def _is_prefix(token: bytes, data: bytes) -> bool:
    return bool(token) and data.startswith(token)


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
