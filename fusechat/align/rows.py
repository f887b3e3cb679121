"""From one source's rows to the pivot's: which row speaks of the same prefix, and what it says in the pivot's ids."""

from __future__ import annotations

import enum
import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.align.backend import engine
from fusechat.align.vocabulary import VocabMap
from fusechat.bytetable import ByteTable, Role
from fusechat.errors import FormatError
from fusechat.store import Block, id_dtype

Array = npt.NDArray[Any]


class RowKind(enum.IntEnum):
    """What an aligned row's distributions are over (design: granularity)."""

    SAME = 0
    """Both next tokens end at the same byte."""
    COARSER = 1
    """The source's next token ends later."""
    FINER = 2
    """The source's next token ends earlier."""
    NONE = 3
    """The source has no boundary at the row's prefix."""


def n_threads() -> int:
    """Return how many threads this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """What alignment needs of a block of a TopKStore, in one model's tokens.

    `gold` int32[R] is the token each row predicts; `turn` int32[R] its assistant message, `starts` and `ends` int32[R]
    where it begins and ends in that message's bytes; `at_end` bool[R] whether it ends the turn.
    """

    block: Block
    table: ByteTable
    control: npt.NDArray[np.uint8]
    gold: npt.NDArray[np.int32]
    turn: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    at_end: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, block: Block, table: ByteTable) -> RowView:
        """Derive a block's rows; raises FormatError for token ids outside the vocabulary."""
        ids, turn, byte_end = block["token.input_ids"], block["token.turn"], block["token.byte_end"]
        if len(ids) and (ids.min() < 0 or ids.max() >= len(table)):
            raise FormatError(
                f"a store holds token ids outside its vocabulary of {len(table)}: remove it and extract again"
            )
        control = (table.roles[ids] != Role.TEXT).astype(np.uint8)
        predicted = block["token.loss_mask"].copy()
        offsets = block.offsets["token"]
        predicted[offsets[:-1][np.diff(offsets) > 0]] = False  # nothing predicts a dialogue's first token
        t = np.flatnonzero(predicted) - 1
        starts = np.where(turn[t] == turn[t + 1], byte_end[t], 0).astype(np.int32)
        ends = byte_end[t + 1]
        return cls(
            block=block,
            table=table,
            control=control,
            gold=ids[t + 1],
            turn=turn[t + 1],
            starts=starts,
            ends=ends,
            at_end=(ends <= starts) & (control[t + 1] != 0),
        )

    @property
    def lead_bytes(self) -> npt.NDArray[np.int64]:
        """How many of the predicted token's bytes lie before its message's text: a dummy space, or the template's."""
        widths = self.table.widths[self.gold] - (self.ends - self.starts)
        return np.where((self.table.roles[self.gold] == Role.TEXT) & ~self.at_end, np.maximum(widths, 0), 0)

    def lead(self, row: int) -> bytes:
        """Return the white space that a row's predicted token carries before its message's text."""
        lead = self.table.token(int(self.gold[row]))[: int(self.lead_bytes[row])]
        return b"" if lead.strip() else lead

    def tokens(self) -> tuple[Array, ...]:
        """Return the engine's view of the token axis."""
        b = self.block
        return (
            b.offsets["token"],
            b.offsets["row"],
            b["token.loss_mask"],
            b["token.turn"],
            b["token.byte_end"],
            self.control,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """Which source row serves each pivot row; all of length R.

    `source_row` int64 is the first source row with the same prefix (−1: none), `chain` int32 how many source rows from
    there on cover the pivot's next token, `rest_bytes` int32 how many of its bytes only the last of them covers when
    that one goes beyond it.
    """

    kind: npt.NDArray[np.uint8]
    source_row: npt.NDArray[np.int64]
    chain: npt.NDArray[np.int32]
    rest_bytes: npt.NDArray[np.int32]


def match_rows(pivot: RowView, source: RowView, partner: npt.NDArray[np.int64], threads: int = 1) -> Matches:
    """Match the rows of pivot dialogue i with those of source dialogue `partner[i]` (−1: the source lacks it).

    Two rows match when the same bytes of the same message come before them: only then do both models predict the same
    next text. Linear in the number of tokens. Raises ValueError when a block contradicts itself.
    """
    kind, source_row, chain, rest = engine().match_rows(pivot.tokens(), source.tokens(), partner, threads)
    return Matches(kind=kind, source_row=source_row, chain=chain, rest_bytes=rest)


@functools.cache
def half_probabilities() -> npt.NDArray[np.float32]:
    """Return exp(−h) for every non-negative half h in the order of their bits, float32[32768]."""
    halves = np.arange(32768, dtype=np.uint16).view(np.float16).astype(np.float64)
    table = np.exp(-np.where(np.isnan(halves), np.inf, halves)).astype(np.float32)
    table.setflags(write=False)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How rows become the pivot's, as numbers the engine knows."""

    granularity: str = "chain"
    unaligned: str = "gold"
    collisions: str = "sum"

    def codes(self) -> tuple[int, int, int]:
        """Return the engine's codes."""
        return (
            {"cells": 0, "chain": 0, "first": 1, "gold": 2}[self.granularity],
            {"gold": 0, "pivot": 1, "skip": 1}[self.unaligned],
            {"sum": 0, "first": 1}[self.collisions],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Remapped:
    """Rows in the pivot's ids: `ids` [R,K], `logprobs` float16[R,K], `gold_logprob` float32[R].

    `mass` uint64[4,3] counts probability by row kind and by what became of it (lost, exact, approximate), `lost`
    uint64[Vs] the lost part by source token, both in units of 2⁻³⁰: whole numbers, equal for any order of summation.
    """

    ids: Array
    logprobs: npt.NDArray[np.float16]
    gold_logprob: npt.NDArray[np.float32]
    mass: npt.NDArray[np.uint64]
    lost: npt.NDArray[np.uint64]


def remap_rows(
    matches: Matches,
    pivot: RowView,
    source: RowView,
    map_index: npt.NDArray[np.int16],
    maps: VocabMap,
    choices: Choices,
    threads: int = 1,
) -> Remapped:
    """Carry the matched source rows into the pivot's vocabulary through the stacked maps that `map_index` names.

    Where a map spreads a candidate over several targets, the K most probable entries are kept.

    Raises ValueError for ids, rows or map entries out of range and for NaN or positive log-probabilities.
    """
    ends_turn = np.isin(source.table.roles, (Role.EOS, Role.TURN)).astype(np.uint8)
    matched = (
        *(matches.kind, matches.source_row, matches.chain, matches.rest_bytes),
        *(pivot.gold, pivot.at_end.astype(np.uint8), map_index),
    )
    ids, logprobs, gold_logprob, mass, lost = engine().remap_rows(
        matched,
        source.block["row.ids"],
        np.ascontiguousarray(source.block["row.logprobs"]).view(np.uint16),
        source.block["row.gold_logprob"],
        source.gold,
        (source.table.data, source.table.offsets),
        ends_turn,
        (pivot.table.data, pivot.table.offsets),
        maps.target,
        maps.weight,
        maps.quality,
        half_probabilities(),
        choices.codes(),
        np.empty(0, id_dtype(len(pivot.table))),
        threads,
    )
    return Remapped(ids=ids, logprobs=logprobs.view(np.float16), gold_logprob=gold_logprob, mass=mass, lost=lost)
