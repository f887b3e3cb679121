"""What is taught at some rows: sparse distributions over the pivot's tokens and ranges of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusechat.align.cells import CellRows

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The sparse targets of R rows, in the dtypes of their store: views of its pages where nothing is changed.

    ids integer[R,K]; logprobs float[R,K], −inf where the entry is absent; partition bool[R], true at the P rows whose
    entries are cells of a partition of the vocabulary, so that the missing mass is its last cell. `cells` are what
    these rows have in place of their ids and logprobs, in their order, None where they have nothing else.
    """

    ids: Array
    logprobs: Array
    partition: Array
    cells: CellRows | None = None

    @classmethod
    def by(cls, ids: Array, logprobs: Array) -> Targets:
        """Return distributions over tokens."""
        return cls(ids=ids, logprobs=logprobs, partition=np.zeros(len(ids), dtype=np.bool_))

    @classmethod
    def nothing(cls, n_rows: int) -> Targets:
        """Return rows without entries."""
        return cls.by(np.zeros((n_rows, 0), np.int32), np.zeros((n_rows, 0), np.float32))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """The most entries a row can have."""
        return max(int(columns.ids.shape[1]) for columns in (self, self.cells) if columns is not None)

    def present(self) -> Array:
        """Return which rows have an entry, bool[R]."""
        found = _present(self.logprobs)
        if self.cells is not None:
            found[self.partition] = _present(self.cells.logprobs)
        return found

    def taken(self, rows: Array) -> Targets:
        """Return some rows, by index int[N]."""
        partition, cells = self.partition[rows], self.cells
        if cells is not None:
            place = (np.cumsum(self.partition) - 1)[rows[partition]]
            cells = CellRows(*(column.take(place, axis=0) for column in cells))
        ids, logprobs = self.ids.take(rows, axis=0), self.logprobs.take(rows, axis=0)
        return Targets(ids=ids, logprobs=logprobs, partition=partition, cells=cells)

    def without(self, rows: Array) -> Targets:
        """Return it with no entry in the rows bool[R] marks."""
        if not rows.any():
            return self
        logprobs = np.where(rows[:, None], self.logprobs.dtype.type(-np.inf), self.logprobs)
        cells, kept = self.cells, ~rows[self.partition]
        if cells is not None:
            cells = CellRows(*(column[kept] for column in cells))
        return replace(self, logprobs=logprobs, partition=self.partition & ~rows, cells=cells)


def joined(parts: Sequence[Targets]) -> Targets:
    """Return the rows of several, one after the other."""
    width = max(t.ids.shape[1] for t in parts)
    return Targets(
        ids=_stacked([t.ids for t in parts], width, 0),
        logprobs=_stacked([t.logprobs for t in parts], width, -np.inf),
        partition=np.concatenate([t.partition for t in parts]),
        cells=_joined_cells(parts),
    )


def picked(parts: Sequence[Targets], which: Array) -> Targets:
    """Return row r of the part int[R] names for it; of parts of R rows each."""
    if len(parts) == 1:
        return parts[0]
    return joined(parts).taken(which * len(which) + np.arange(len(which)))


def mixed(parts: Sequence[Targets], weights: Array, *, renormalise: bool, beside: Sequence[Targets] = ()) -> Targets:
    """Return the mixture Σ_c weights_c · p_c of distributions over tokens, then the rows of `beside` as they are.

    weights float32[C, R]. The entries stand side by side, since the loss adds up equal ids; those of weight zero become
    absent. `renormalise` scales each part's entries to a sum of one first, as the loss would have done with each alone.
    """
    n_rows, widths = len(parts[0]), [t.ids.shape[1] for t in parts]
    shape = n_rows + sum(map(len, beside)), sum(widths)
    ids = np.empty(shape, np.result_type(*(t.ids for t in parts)))
    logprobs = np.empty(shape, np.result_type(*(t.logprobs for t in parts)))
    ends = np.cumsum(widths).tolist()
    for part, width, end in zip(parts, widths, ends):
        ids[:n_rows, end - width : end] = part.ids
        logprobs[:n_rows, end - width : end] = part.logprobs
    _stack([t.ids for t in beside], ids[n_rows:], 0)
    _stack([t.logprobs for t in beside], logprobs[n_rows:], -np.inf)
    # torch converts half precision ten times as fast as NumPy.
    floats = torch.from_numpy(logprobs).float()
    if renormalise:
        for width, end in zip(widths, ends):
            own = floats[:n_rows, end - width : end]
            sums = own.logsumexp(1)
            own -= sums.where(sums.isfinite(), 0.0)[:, None]
    mixture = floats.numpy()
    with np.errstate(divide="ignore"):
        mixture[:n_rows] += np.repeat(np.log(weights.T), widths, axis=1)
    partition = np.concatenate([np.zeros(n_rows, np.bool_), *(t.partition for t in beside)])
    return Targets(ids=ids, logprobs=mixture, partition=partition, cells=_joined_cells(beside))


def _present(logprobs: Array) -> Array:
    found = np.zeros(len(logprobs), dtype=np.bool_)
    for column in logprobs.T:  # nearly always the first entry settles it
        found |= column > -np.inf
        if found.all():
            break
    return found


def _stacked(columns: Sequence[Array], width: int, absent: float) -> Array:
    """Return columns [R,≤K] as one [ΣR,K], filled up with what says that an entry is absent."""
    stacked = np.empty((sum(map(len, columns)), width), np.result_type(*columns))
    _stack(columns, stacked, absent)
    return stacked


def _stack(columns: Sequence[Array], out: Array, absent: float) -> None:
    """Write columns [R,≤K] into out [ΣR,K]."""
    begin = 0
    for column in columns:
        part = out[begin : begin + len(column)]
        part[:, : column.shape[1]] = column
        part[:, column.shape[1] :] = absent
        begin += len(column)


def _joined_cells(parts: Sequence[Targets]) -> CellRows | None:
    """Return what the partitions of several have, one after the other; a part without cells gives its entries."""
    if all(t.cells is None for t in parts):
        return None
    every = []
    for t in parts:
        ids, logprobs = t.ids[t.partition], t.logprobs[t.partition]
        none = np.zeros(ids.shape, np.int32)
        every.append(t.cells or CellRows(ids, logprobs, none, none))
    width = max(cells.ids.shape[1] for cells in every)
    columns = zip(*every, strict=True)
    return CellRows(*(_stacked(column, width, absent) for column, absent in zip(columns, (0, -np.inf, 0, 0))))
