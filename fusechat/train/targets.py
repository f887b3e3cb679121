"""What is taught at some rows: sparse distributions over the pivot's tokens and ranges of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The sparse targets of R rows.

    ids int32[R,K]; logprobs float32[R,K], −inf where the entry is absent; low, high int32[R,K], high > low where the
    entry is a range of the byte-sorted vocabulary instead of an id, None where no row has ranges; partition bool[R],
    true where the entries are cells of a partition of the vocabulary, so that the missing mass is its last cell.
    """

    ids: Array
    logprobs: Array
    low: Array | None
    high: Array | None
    partition: Array

    @classmethod
    def by(cls, ids: Array, logprobs: Array, low: Array | None = None, high: Array | None = None) -> Targets:
        return cls(
            ids=ids.astype(np.int32),
            logprobs=logprobs.astype(np.float32),
            low=low,
            high=high,
            partition=np.zeros(len(ids), dtype=np.bool_),
        )

    @classmethod
    def nothing(cls, n_rows: int) -> Targets:
        """Return rows without entries."""
        return cls.by(np.zeros((n_rows, 0)), np.zeros((n_rows, 0)))

    @property
    def width(self) -> int:
        """K."""
        return int(self.ids.shape[1])

    def present(self) -> Array:
        """Return which rows have an entry, bool[R]."""
        found = np.zeros(len(self.logprobs), dtype=np.bool_)
        for k in range(self.width):  # nearly always the first entry settles it
            found |= self.logprobs[:, k] > -np.inf
            if found.all():
                break
        return found

    def columns(self) -> dict[str, Array]:
        """Return the columns [R,K] by name; where no row has ranges, low and high are zero."""
        low, high = self.low, self.high
        if low is None or high is None:
            low = high = np.zeros(self.ids.shape, dtype=np.int32)
        return {"ids": self.ids, "logprobs": self.logprobs, "low": low, "high": high}

    def spread(self, rows: Array) -> Targets:
        """Put these rows at the places bool[R] marks, with nothing between them."""
        if not len(self.ids):
            return Targets.nothing(len(rows))
        place = np.where(rows, np.cumsum(rows) - 1, 0)
        columns = {name: column[place] for name, column in self.columns().items()}
        return Targets(**columns, partition=self.partition[place])

    def taken(self, rows: Array) -> Targets:
        """Return some rows, by index or mask."""
        low, high = (None if column is None else column[rows] for column in (self.low, self.high))
        return Targets(
            ids=self.ids[rows], logprobs=self.logprobs[rows], low=low, high=high, partition=self.partition[rows]
        )

    def replaced(self, where: Array, other: Targets) -> Targets:
        """Take the rows bool[R] marks from another."""
        if not where.any():
            return self
        width = max(self.width, other.width)
        ours, theirs = self.widened(width), other.widened(width)
        if ours.low is None and theirs.low is None:
            names = ["ids", "logprobs"]
        else:
            names = ["ids", "logprobs", "low", "high"]
        mine, others = ours.columns(), theirs.columns()
        columns: dict[str, Any] = {name: np.where(where[:, None], others[name], mine[name]) for name in names}
        return Targets(**{"low": None, "high": None} | columns, partition=self.partition)

    def widened(self, width: int) -> Targets:
        """Add absent entries up to `width`."""
        if width == self.width:
            return self
        pad = ((0, 0), (0, width - self.width))
        low, high = (None if column is None else np.pad(column, pad) for column in (self.low, self.high))
        return Targets(
            ids=np.pad(self.ids, pad),
            logprobs=np.pad(self.logprobs, pad, constant_values=-np.inf),
            low=low,
            high=high,
            partition=self.partition,
        )
