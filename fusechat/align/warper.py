"""`tokens: dtw` on stores: whole dialogues warped, then the research code's branches, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.align.paper import branches, paired_ids
from fusechat.align.rows import Choices, Matches, Remapped, RowKind, RowView, remap_rows
from fusechat.align.statistics import PairCounts, no_counts
from fusechat.align.timewarp import Warp, dtw
from fusechat.align.tokenizer import Vocabulary
from fusechat.align.vocabulary import VocabMap

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warper:
    """Both vocabularies as the strings the research code compares."""

    source_strings: list[str]
    pivot_strings: list[str]
    source_mark: str
    pivot_mark: str

    @classmethod
    def of(cls, source: Vocabulary, pivot: Vocabulary) -> Warper:
        """Decode every id of both vocabularies alone."""
        return cls(
            source_strings=source.strings(),
            pivot_strings=pivot.strings(),
            source_mark=source.mark,
            pivot_mark=pivot.mark,
        )

    def count(self, pivot: RowView, source: RowView, partner: npt.NDArray[np.int64]) -> PairCounts:
        """Count the pairs of ids on the warping paths of all dialogues."""
        counts = no_counts()
        for i, p in self._pairs(pivot, source, partner):
            counts += paired_ids(self._warp(pivot, source, i, p).ranges(), _ids(source, p), _ids(pivot, i))
        return counts

    def align(
        self,
        pivot: RowView,
        source: RowView,
        partner: npt.NDArray[np.int64],
        map_index: int,
        maps: VocabMap,
        choices: Choices,
        threads: int,
    ) -> tuple[Matches, Remapped]:
        """Return what serves each pivot row and the rows.

        A row that takes a distribution is of kind SAME, all others NONE: one-hot ones with their entry; rows of a
        dialogue that the source lacks, and rows none of whose candidates has a target, as `choices.unaligned` says.
        """
        n = len(pivot.gold)
        source_row, has_source = np.full(n, -1, np.int64), np.zeros(n, np.bool_)
        for i, p in self._pairs(pivot, source, partner):
            chosen = self._branches(pivot, source, i, p)[_positions(pivot, i)]
            first = int(pivot.block.offsets["row"][i])
            rows = slice(first, first + len(chosen))
            row_at = np.full(len(_ids(source, p)), -1, np.int64)
            positions = _positions(source, p)
            row_at[positions] = int(source.block.offsets["row"][p]) + np.arange(len(positions))
            source_row[rows] = np.where(chosen >= 0, row_at[np.maximum(chosen, 0)], -1)
            has_source[rows] = True
        used = source_row >= 0
        matches = Matches(
            # To the engine a finer row that is taken as it stands: no rule for the gold token.
            kind=np.where(used, RowKind.FINER, RowKind.NONE).astype(np.uint8),
            source_row=source_row,
            chain=used.astype(np.int32),
            rest_bytes=np.zeros(n, np.int32),
        )
        as_it_stands = replace(choices, granularity="first", unaligned="gold")
        plain = replace(pivot, at_end=np.zeros(n, np.bool_))
        remapped = remap_rows(matches, plain, source, np.full(n, map_index, np.int16), maps, as_it_stands, threads)
        without_target = used & np.isneginf(remapped.logprobs).all(axis=1)
        if choices.unaligned == "gold":
            remapped.ids[without_target, :1] = pivot.gold[without_target, None]
            remapped.logprobs[without_target, :1] = 0
        else:
            remapped.ids[~has_source], remapped.logprobs[~has_source] = 0, -np.inf
        mass = np.zeros_like(remapped.mass)
        mass[RowKind.SAME] = remapped.mass[RowKind.FINER]
        kind = np.where(used & ~without_target, RowKind.SAME, RowKind.NONE).astype(np.uint8)
        return replace(matches, kind=kind), replace(remapped, mass=mass)

    def _pairs(self, pivot: RowView, source: RowView, partner: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        for i, p in enumerate(partner.tolist()):
            if p >= 0 and len(_ids(pivot, i)) and len(_ids(source, p)):
                yield i, p

    def _warp(self, pivot: RowView, source: RowView, i: int, p: int) -> Warp:
        return dtw(
            [self.source_strings[t] for t in _ids(source, p).tolist()],
            [self.pivot_strings[t] for t in _ids(pivot, i).tolist()],
            source_mark=self.source_mark,
            pivot_mark=self.pivot_mark,
        )

    def _branches(self, pivot: RowView, source: RowView, i: int, p: int) -> npt.NDArray[np.int32]:
        return branches(
            self._warp(pivot, source, i, p).pivot_to_source,
            [self.source_strings[t] for t in _ids(source, p).tolist()],
            [self.pivot_strings[t] for t in _ids(pivot, i).tolist()],
            source_mark=self.source_mark,
            pivot_mark=self.pivot_mark,
        )


def _ids(view: RowView, dialogue: int) -> npt.NDArray[np.int32]:
    offsets = view.block.offsets["token"]
    ids: npt.NDArray[np.int32] = view.block["token.input_ids"][offsets[dialogue] : offsets[dialogue + 1]]
    return ids


def _positions(view: RowView, dialogue: int) -> npt.NDArray[np.int64]:
    offsets = view.block.offsets["token"]
    return np.flatnonzero(view.block["token.loss_mask"][offsets[dialogue] : offsets[dialogue + 1]][1:])
