"""What one source offers at the pivot's rows: from its AlignedStore, or from a TopKStore of the pivot's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusechat.align import RowKind, read_byte_order
from fusechat.align.cells import CellRows
from fusechat.artifact import MANIFEST, sha256_file
from fusechat.errors import MismatchError
from fusechat.store import ALIGNED_FORMAT, TOPK_FORMAT, Store, format_of
from fusechat.train.targets import Array, Targets, picked
from fusechat.twins import TOTALS, twin_totals

Record = Mapping[str, Array]


class Source(Protocol):
    """A candidate beside the pivot."""

    name: str
    byte_order: npt.NDArray[np.int32] | None

    def totals(self) -> dict[int, tuple[float, ...]]:
        """Return, for each dialogue the source has, the values of TOTALS."""

    def read(self, dialogue: int) -> Record:
        """Return the dialogue's columns; `row.gold_logprob` is NaN where the source has no probability of the token."""

    def targets(self, record: Record, pivot: Record) -> Targets:
        """Return what the source teaches at each pivot row of a dialogue that was read."""


def open_source(directory: Path, pivot: Store, name: str) -> Source:
    """Open a source's AlignedStore, or its TopKStore if its byte table is the pivot's.

    Raises MismatchError for a store that belongs to another pivot store, other dialogues or another tokenizer.
    """
    if format_of(directory) == TOPK_FORMAT:
        return TwinSource(pivot, Store(directory, TOPK_FORMAT), name)
    return AlignedSource(pivot, Store(directory, ALIGNED_FORMAT), name)


class AlignedSource:
    """A source of another vocabulary."""

    def __init__(self, pivot: Store, store: Store, name: str) -> None:
        ours, theirs = sha256_file(pivot.directory / MANIFEST), store.manifest["pivot_store_sha256"]
        if ours != theirs:
            raise MismatchError(
                f"{store.directory} was aligned to another pivot store: {theirs[:12]}… there, {ours[:12]}… is "
                f"{pivot.directory}; run the alignment again"
            )
        self.name = name
        self.store = store
        self.unaligned: str = store.manifest["unaligned"]
        cells = store.manifest["granularity"] == "cells"
        self.byte_order = read_byte_order(store.directory) if cells else None

    def totals(self) -> dict[int, tuple[float, ...]]:
        """Return, for each dialogue the source has, the values of TOTALS."""
        found: dict[int, tuple[float, ...]] = {}
        for number in range(self.store.n_shards):
            shard = self.store.shard(number)
            columns = [shard[f"dialogue.{name}"].tolist() for name in TOTALS]
            found |= dict(zip(shard["dialogue.index"].tolist(), zip(*columns)))
        return {dialogue: values for dialogue, values in found.items() if np.isfinite(values[0])}

    def read(self, dialogue: int) -> Record:
        """Return the dialogue's columns."""
        return self.store[dialogue]

    def targets(self, record: Record, pivot: Record) -> Targets:
        """Return the source's rows; where it has none, what `unaligned` asks for (`gold` is in the store already)."""
        kind = record["row.kind"]
        taught = Targets.by(record["row.ids"], record["row.logprobs"])
        if self.unaligned == "pivot":
            # One-hot rows of `tokens: dtw` are of this kind too, and have their entry.
            nothing = (kind == RowKind.NONE) & ~taught.present()
            taught = picked([taught, Targets.by(pivot["row.ids"], pivot["row.logprobs"])], nothing.astype(np.int64))
        finer = kind == RowKind.FINER
        if self.byte_order is None:
            return replace(taught, partition=finer)
        cells = CellRows(*(record[f"cell.{name}"] for name in CellRows._fields))
        return replace(taught, partition=finer, cells=cells if len(cells.ids) else None)


class TwinSource:
    """A source whose byte table is the pivot's: its rows need no alignment, where it has the same assistant tokens."""

    def __init__(self, pivot: Store, store: Store, name: str) -> None:
        for key, what in (("tokenizer_sha256", "tokenizers"), ("dataset_fingerprint", "dialogues")):
            ours, theirs = pivot.manifest[key], store.manifest[key]
            if ours != theirs:
                raise MismatchError(
                    f"{store.directory} and {pivot.directory} have different {what} ({theirs[:12]}… and {ours[:12]}…): "
                    "align the source's store to the pivot's first"
                )
        self.name = name
        self.byte_order: npt.NDArray[np.int32] | None = None
        self.pivot = pivot
        self.store = store

    def totals(self) -> dict[int, tuple[float, ...]]:
        """Return, for each dialogue of which both have the same assistant tokens, the values of TOTALS."""
        return twin_totals(self.pivot, self.store)

    def read(self, dialogue: int) -> Record:
        """Return the dialogue's columns."""
        return self.store[dialogue]

    def targets(self, record: Record, pivot: Record) -> Targets:
        """Return the source's rows as they are."""
        return Targets.by(record["row.ids"], record["row.logprobs"])
