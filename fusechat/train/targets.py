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

    ids int64[R,K]; logprobs float32[R,K], −inf where the entry is absent; low, high int32[R,K], high > low where the
    entry is a range of the byte-sorted vocabulary instead of an id; partition bool[R], true where the entries are cells
    of a partition of the vocabulary, so that the missing mass is its last cell.
    """

    ids: Array
    logprobs: Array
    low: Array
    high: Array
    partition: Array

    @classmethod
    def by(cls, ids: Array, logprobs: Array, low: Array | None = None, high: Array | None = None) -> Targets:
        none = np.zeros(ids.shape, dtype=np.int32)
        return cls(
            ids=ids.astype(np.int64),
            logprobs=logprobs.astype(np.float32),
            low=none if low is None else low,
            high=none if high is None else high,
            partition=np.zeros(len(ids), dtype=np.bool_),
        )

    def spread(self, rows: Array) -> Targets:
        """Put these rows at the places bool[R] marks, with nothing between them."""
        place = np.cumsum(rows) - 1
        spread = {name: getattr(self, name)[np.where(rows, place, 0)] for name in self.__slots__ if len(self.ids)}
        return Targets(**spread) if spread else Targets.by(np.zeros((len(rows), 0)), np.zeros((len(rows), 0)))

    def replaced(self, where: Array, other: Targets) -> Targets:
        """Take the rows bool[R] marks from another."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        ours, theirs = self.widened(width), other.widened(width)
        columns = {
            name: np.where(where[:, None], getattr(theirs, name), getattr(ours, name))
            for name in ("ids", "logprobs", "low", "high")
        }
        return Targets(**columns, partition=self.partition)

    def widened(self, width: int) -> Targets:
        """Add absent entries up to `width`."""
        pad = ((0, 0), (0, width - self.ids.shape[1]))
        return Targets(
            ids=np.pad(self.ids, pad),
            logprobs=np.pad(self.logprobs, pad, constant_values=-np.inf),
            low=np.pad(self.low, pad),
            high=np.pad(self.high, pad),
            partition=self.partition,
        )
