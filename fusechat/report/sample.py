"""Dialogues in both tokenizations, cut where both have a boundary, with what each model expected there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fusechat.align.rows import RowKind, RowView
from fusechat.align.tokenizer import store_vocabulary
from fusechat.artifact import Json
from fusechat.bytetable import ByteTable
from fusechat.readable import decoded, readable
from fusechat.report.words import percent
from fusechat.store import Block, Store, make_block, open_aligned, open_topk

TOP = 5
MIN_ROWS = 12
MAX_TOKEN_CHARACTERS = 60
_CANDIDATES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizations:
    """The stores of a pivot and of one source, with both vocabularies."""

    pivot: Store
    source: Store
    aligned: Store
    pivot_table: ByteTable
    source_table: ByteTable

    @classmethod
    def open(cls, pivot: Path, source: Path, aligned: Path) -> Tokenizations:
        """Open the stores; raises FormatError for a store, DataError and MismatchError for a tokenizer."""
        stores = open_topk(pivot, verify=False), open_topk(source, verify=False)
        tables = [store_vocabulary(store.directory, store.manifest).table for store in stores]
        return cls(
            pivot=stores[0],
            source=stores[1],
            aligned=open_aligned(aligned, verify=False),
            pivot_table=tables[0],
            source_table=tables[1],
        )

    def dialogues(self, max_segments: int) -> list[Json]:
        """Return a typical dialogue and the one that aligned worst, each cut to half of `max_segments`."""
        chosen = self._typical_and_worst()
        return [self._dialogue(index, why, max_segments // len(chosen)) for index, why in chosen]

    def _typical_and_worst(self) -> list[tuple[int, str]]:
        both = [index for index in self.aligned if index in self.source][:_CANDIDATES]
        kinds = {index: self.aligned[index]["row.kind"] for index in both}
        share = {index: float(np.mean(k != RowKind.NONE)) for index, k in kinds.items() if len(k) >= MIN_ROWS}
        share = share or {index: float(np.mean(k != RowKind.NONE)) for index, k in kinds.items() if len(k)}
        if not share:
            return []
        middle = float(np.median(list(share.values())))
        typical = min(share, key=lambda index: (abs(share[index] - middle), index))
        worst = min(share, key=lambda index: (share[index], index))
        chosen = [(typical, f"a typical dialogue, {percent(share[typical])} of its rows aligned")]
        if share[worst] < share[typical]:
            chosen.append((worst, f"the one that aligned worst, {percent(share[worst])}"))
        return chosen

    def _dialogue(self, index: int, why: str, max_segments: int) -> Json:
        pivot = _Rows.of(self.pivot, index, self.pivot_table)
        source = _Rows.of(self.source, index, self.source_table)
        kinds = self.aligned[index]["row.kind"]
        segments = list(_segments(pivot, source))
        return {
            "dialogue": index,
            "why": why,
            "n_segments": len(segments),
            "segments": [
                {
                    "pivot": [
                        {**pivot.token(r), "kind": RowKind(int(kinds[r])).name.lower(), "top": pivot.top(r)}
                        for r in ours
                    ],
                    "source": [{**source.token(r), "top": source.top(r)} for r in theirs],
                }
                for ours, theirs in segments[:max_segments]
            ],
        }


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one dialogue in one model's tokens."""

    view: RowView
    block: Block

    @classmethod
    def of(cls, store: Store, index: int, table: ByteTable) -> _Rows:
        block = make_block([store[index]])
        return cls(RowView.of(block, table), block)

    def __len__(self) -> int:
        return len(self.view.gold)

    @property
    def ends(self) -> list[tuple[int, int, int]]:
        """Where each row's token ends: turn, byte, and whether it is what closes the turn."""
        return [
            (int(turn), int(end), int(closes))
            for turn, end, closes in zip(self.view.turn, self.view.ends, self.view.at_end, strict=True)
        ]

    def token(self, row: int) -> Json:
        """The token a row predicts, as text, and its probability."""
        return {
            "text": token_text(self.view.table, int(self.view.gold[row])),
            "p": _probability(self.block["row.gold_logprob"][row]),
        }

    def top(self, row: int) -> list[list[object]]:
        """The most probable tokens of a row, with their probabilities."""
        logprobs = self.block["row.logprobs"][row].astype(np.float32)
        best = np.argsort(-logprobs, kind="stable")[:TOP]
        return [
            [token_text(self.view.table, int(self.block["row.ids"][row][k])), _probability(logprobs[k])]
            for k in best.tolist()
            if np.isfinite(logprobs[k])
        ]


def _segments(pivot: _Rows, source: _Rows) -> list[tuple[range, range]]:
    """Cut both dialogues at the boundaries they share; what only one of them has stays in its segment's other side."""
    ours, theirs = pivot.ends, source.ends
    shared = set(ours) & set(theirs)
    segments, p, s = [], 0, 0
    for end in sorted(shared):
        next_p, next_s = _after(ours, end, p), _after(theirs, end, s)
        segments.append((range(p, next_p), range(s, next_s)))
        p, s = next_p, next_s
    if p < len(ours) or s < len(theirs):
        segments.append((range(p, len(ours)), range(s, len(theirs))))
    return segments


def _after(ends: list[tuple[int, int, int]], end: tuple[int, int, int], begin: int) -> int:
    position = begin
    while position < len(ends) and ends[position] <= end:
        position += 1
    return position


def token_text(table: ByteTable, token_id: int) -> str:
    """Show a token's bytes as text on one line; what cannot be shown is escaped, what is very long is cut."""
    text = readable(decoded(table.token(token_id)).replace("\n", "⏎").replace("\t", "⇥"))
    if len(text) > MAX_TOKEN_CHARACTERS:
        return f"{text[:MAX_TOKEN_CHARACTERS]}… ({len(text):,} characters)"
    return text


def _probability(logprob: npt.NDArray[np.float32] | np.float32) -> float:
    return round(float(np.exp(np.float32(logprob))), 4)
