"""What is taught at some rows: sparse distributions over the pivot's tokens and ranges of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
_ABSENT = {"ids": 0, "logprobs": -np.inf, "low": 0, "high": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The sparse targets of R rows, in the dtypes of their store: views of its pages where nothing is changed.

    ids integer[R,K]; logprobs float[R,K], −inf where the entry is absent; low, high int32[R,K], high > low where the
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
        return cls(ids=ids, logprobs=logprobs, low=low, high=high, partition=np.zeros(len(ids), dtype=np.bool_))

    @classmethod
    def nothing(cls, n_rows: int) -> Targets:
        """Return rows without entries."""
        return cls.by(np.zeros((n_rows, 0), np.int32), np.zeros((n_rows, 0), np.float32))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """K."""
        return int(self.ids.shape[1])

    def present(self) -> Array:
        """Return which rows have an entry, bool[R]."""
        found = np.zeros(len(self), dtype=np.bool_)
        for k in range(self.width):  # nearly always the first entry settles it
            found |= self.logprobs[:, k] > -np.inf
            if found.all():
                break
        return found

    def columns(self, names: Sequence[str]) -> dict[str, Array]:
        """Return columns [R,K] by name; where no row has ranges, low and high are zero."""
        found = {name: getattr(self, name) for name in names}
        return {
            name: np.zeros(self.ids.shape, np.int32) if column is None else column for name, column in found.items()
        }

    def taken(self, rows: Array) -> Targets:
        """Return some rows, by index int[N]."""
        columns = {name: None if column is None else column.take(rows, axis=0) for name, column in self._all().items()}
        return Targets(**columns, partition=self.partition[rows])  # type: ignore[arg-type]

    def filled(self, where: Array, other: Targets) -> Targets:
        """Put another's rows, one after the other, at the places bool[R] marks."""
        if not len(other):
            return self
        width, place = max(self.width, other.width), np.flatnonzero(where)
        columns: dict[str, Any] = {"low": None, "high": None}
        for name in _names([self, other]):
            ours, theirs = self.columns([name])[name], other.columns([name])[name]
            column = np.full((len(self), width), _ABSENT[name], np.result_type(ours, theirs))
            column[:, : self.width] = ours
            column[place, : other.width] = theirs
            column[place, other.width :] = _ABSENT[name]
            columns[name] = column
        partition = self.partition.copy()
        partition[place] = other.partition
        return Targets(**columns, partition=partition)

    def without(self, rows: Array) -> Targets:
        """Return it with no entry in the rows bool[R] marks."""
        if not rows.any():
            return self
        logprobs = np.where(rows[:, None], self.logprobs.dtype.type(-np.inf), self.logprobs)
        return replace(self, logprobs=logprobs, partition=self.partition & ~rows)

    def widened(self, width: int) -> Targets:
        """Add absent entries up to `width`."""
        if width == self.width:
            return self
        columns: dict[str, Array | None] = {}
        for name, column in self._all().items():
            columns[name] = None
            if column is not None:
                columns[name] = wide = np.full((len(column), width), _ABSENT[name], column.dtype)
                wide[:, : self.width] = column
        return Targets(**columns, partition=self.partition)  # type: ignore[arg-type]

    def _all(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ABSENT}


def joined(parts: Sequence[Targets]) -> Targets:
    """Return the rows of several, one after the other."""
    width, names = max(t.width for t in parts), _names(parts)
    every = [t.widened(width).columns(names) for t in parts]
    columns: dict[str, Any] = {name: np.concatenate([columns[name] for columns in every]) for name in names}
    partition = np.concatenate([t.partition for t in parts])
    return Targets(**{"low": None, "high": None} | columns, partition=partition)


def picked(parts: Sequence[Targets], which: Array) -> Targets:
    """Return row r of the part int[R] names for it; of parts of R rows each."""
    if len(parts) == 1:
        return parts[0]
    return joined(parts).taken(which * len(which) + np.arange(len(which)))


def mixed(parts: Sequence[Targets], weights: Array, *, renormalise: bool) -> Targets:
    """Return the mixture Σ_c weights_c · p_c of distributions over tokens; weights float32[C, R].

    The entries stand side by side, since the loss adds up equal ids; those of weight zero become absent. `renormalise`
    scales each part's entries to a sum of one first, as the loss would have done with each alone.
    """
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    begin = 0
    logprobs = torch.empty(len(parts[0]), sum(t.width for t in parts))
    for part, log_weight in zip(parts, log_weights):
        own = torch.from_numpy(part.logprobs.astype(part.logprobs.dtype))  # its own copy: pages cannot be written
        scale = torch.from_numpy(log_weight)
        if renormalise:
            sums = own.float().logsumexp(1)
            scale = scale - sums.where(sums.isfinite(), 0.0)
        torch.add(own, scale[:, None], out=logprobs[:, begin : begin + part.width])
        begin += part.width
    return Targets.by(np.concatenate([t.ids for t in parts], axis=1), logprobs.numpy())


def _names(every: Sequence[Targets]) -> tuple[str, ...]:
    return ("ids", "logprobs") if all(t.low is None for t in every) else ("ids", "logprobs", "low", "high")
