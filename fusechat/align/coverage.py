"""What alignment did: rows by kind, probability mass by fate, the worst tokens, and examples to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.align.rows import Matches, Remapped, RowKind, RowView
from fusechat.artifact import Json
from fusechat.bytetable import ByteTable
from fusechat.readable import decoded

WORST_TOKENS = 20
EXAMPLES_PER_SHARD = 1
EXAMPLE_ROWS = 24
_UNIT = float(1 << 30)
_FATES = ("lost", "exact", "approximate")


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of one shard, in whole numbers so that shards add up the same in any order."""

    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(RowKind), np.int64))
    mass: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros((len(RowKind), 3), np.uint64))
    lost: dict[int, int] = field(default_factory=dict)
    examples: list[Json] = field(default_factory=list)

    def add(self, matches: Matches, remapped: Remapped) -> None:
        """Count one aligned piece."""
        self.rows += np.bincount(matches.kind, minlength=len(RowKind))
        self.mass += remapped.mass
        for token_id in np.flatnonzero(remapped.lost).tolist():
            self.lost[token_id] = self.lost.get(token_id, 0) + int(remapped.lost[token_id])

    def to_json(self) -> Json:
        """Return the counts as JSON values, for the shard's note."""
        return {
            "rows": self.rows.tolist(),
            "mass": self.mass.tolist(),
            "lost": {str(k): v for k, v in sorted(self.lost.items())},
            "examples": self.examples,
        }


def coverage(tallies: list[Json], source: ByteTable) -> Json:
    """Add the shards' tallies up to the report.

    `rows`: share of rows by kind. `mass`: share of the source's stored probability by what became of it, over the rows
    whose candidates were mapped, in all and by kind. `lost_tokens`: the source tokens that lost most, with their share
    of all lost mass. `examples`: some messages in both tokenizations.
    """
    rows = np.zeros(len(RowKind), np.int64)
    mass = np.zeros((len(RowKind), 3))
    lost: dict[int, int] = {}
    for tally in tallies:
        rows += np.asarray(tally["rows"], np.int64)
        mass += np.asarray(tally["mass"], np.float64) / _UNIT
        for token_id, units in tally["lost"].items():
            lost[int(token_id)] = lost.get(int(token_id), 0) + units
    worst = sorted(lost.items(), key=lambda item: (-item[1], item[0]))[:WORST_TOKENS]
    all_lost = sum(lost.values())
    return {
        "rows": {kind.name.lower(): float(rows[kind] / max(rows.sum(), 1)) for kind in RowKind},
        "n_rows": {kind.name.lower(): int(rows[kind]) for kind in RowKind},
        "mass": _shares(mass.sum(axis=0)),
        "mass_by_kind": {k.name.lower(): _shares(mass[k]) for k in RowKind if mass[k].sum() > 0},
        "lost_tokens": [{"id": i, "bytes": decoded(source.token(i)), "share": units / all_lost} for i, units in worst],
        "examples": [example for tally in tallies for example in tally["examples"]],
    }


def _shares(mass: npt.NDArray[Any]) -> Json:
    total = float(mass.sum())
    return {fate: float(mass[i]) / total if total else 0.0 for i, fate in enumerate(_FATES)}


def example(pivot: RowView, source: RowView, matches: Matches, dialogue: int, partner: int) -> Json:
    """Return the first rows of one dialogue in both tokenizations, tokens as text, with their kinds."""
    index = int(pivot.block["dialogue.index"][dialogue])
    offsets = pivot.block.offsets["row"]
    first, last = int(offsets[dialogue]), int(offsets[dialogue + 1])
    last = min(last, first + EXAMPLE_ROWS)
    offsets = source.block.offsets["row"]
    s_first, s_last = int(offsets[partner]), int(offsets[partner + 1])
    s_turn, s_starts = source.turn[s_first:s_last], source.starts[s_first:s_last]
    shown = np.zeros(len(s_turn), np.bool_)
    if last > first:
        turn, end = pivot.turn[last - 1], pivot.ends[last - 1]
        shown = (s_turn < turn) | ((s_turn == turn) & (s_starts < end))
    s_rows = s_first + np.flatnonzero(shown)
    return {
        "dialogue": index,
        "pivot": _pieces(pivot, np.arange(first, last)),
        "source": _pieces(source, s_rows),
        "kinds": [RowKind(int(k)).name.lower() for k in matches.kind[first:last]],
    }


def _pieces(view: RowView, rows: npt.NDArray[np.int64]) -> list[Json]:
    return [
        {
            "text": decoded(view.table.token(int(view.gold[r]))),
            "from": int(view.starts[r]),
            "to": int(view.ends[r]),
        }
        for r in rows
    ]
