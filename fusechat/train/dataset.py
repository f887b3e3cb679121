"""Training examples: the pivot's tokens, and for every row the distribution that is to be taught there.

With `min_ce` a source teaches the dialogues on whose text it had a lower cross-entropy than the pivot (arXiv
2408.07990, §3.2; ties go to the pivot). On the others the paper teaches the pivot its own distribution, which holds the
target back where training moves it far (docs/quality.md); the default is to leave them to their labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusechat.align import RowKind, read_byte_order
from fusechat.artifact import MANIFEST, sha256_file
from fusechat.errors import MismatchError
from fusechat.store import Store, row_positions
from fusechat.train.targets import Array, Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One dialogue.

    input_ids int64[T]; labels int64[T], −100 where not the assistant's; rows int64[R], the positions that predict an
    assistant token, and their targets; hard_weight float32[R], λ, or 1 where nothing is taught.
    """

    input_ids: Array
    labels: Array
    rows: Array
    targets: Targets
    hard_weight: Array


class FusionDataset:
    """Examples from a pivot's TopKStore and, unless it is the SFT control, one source's AlignedStore.

    Raises MismatchError when the aligned store was made from another pivot store.
    """

    def __init__(
        self,
        pivot: Store,
        aligned: Store | None,
        *,
        hard_weight: float,
        select: Literal["min_ce", "source"] = "min_ce",
        when_pivot_wins: Literal["labels", "pivot"] = "labels",
        ce_unit: Literal["byte", "token"] = "byte",
    ) -> None:
        self.pivot = pivot
        self.aligned = aligned
        self.hard_weight = hard_weight
        self.when_pivot_wins = when_pivot_wins
        self.indices = sorted(pivot)
        self.unaligned = ""
        self.byte_order: npt.NDArray[np.int32] | None = None
        if aligned is not None:
            _require_same_pivot(pivot, aligned)
            self.unaligned = aligned.manifest["unaligned"]
            if aligned.manifest["granularity"] == "cells":
                self.byte_order = read_byte_order(aligned.directory)
        self.from_source = {i: self._source_wins(i, select, ce_unit) for i in self.indices}

    def _source_wins(self, dialogue: int, select: str, ce_unit: str) -> bool:
        if self.aligned is None:
            return False
        record = self.aligned[dialogue]
        source_nll, pivot_nll = float(record["dialogue.source_nll"][0]), float(record["dialogue.pivot_nll"][0])
        if not np.isfinite(source_nll):  # the source has no such dialogue
            return False
        if select == "source":
            return True
        if ce_unit == "token":
            source_nll /= max(int(record["dialogue.source_tokens"][0]), 1)
            pivot_nll /= max(int(record["dialogue.pivot_tokens"][0]), 1)
        return source_nll < pivot_nll  # per byte: both over the same bytes

    @property
    def source_share(self) -> float:
        """Share of dialogues whose taught distribution is the source's."""
        return sum(self.from_source.values()) / max(len(self.indices), 1)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Example:
        dialogue = self.indices[position]
        record = self.pivot[dialogue]
        mask = record["token.loss_mask"]
        input_ids = record["token.input_ids"].astype(np.int64)
        if self.aligned is not None and self.from_source[dialogue]:
            taught = self._source_rows(self.aligned[dialogue], record)
        elif self.aligned is not None and self.when_pivot_wins == "pivot":
            taught = Targets.by(record["row.ids"], record["row.logprobs"])
        else:
            taught = Targets.by(record["row.ids"][:, :0], record["row.logprobs"][:, :0])
        absent = np.isneginf(taught.logprobs)
        return Example(
            input_ids=input_ids,
            labels=np.where(mask, input_ids, -100),
            rows=row_positions(mask),
            targets=taught,
            hard_weight=np.where(absent.all(axis=1), 1.0, self.hard_weight).astype(np.float32),
        )

    def _source_rows(self, source: dict[str, Array], pivot: dict[str, Array]) -> Targets:
        """The source's rows; where it has none, what `unaligned` asks for (`gold` rows are in the store already)."""
        kind = source["row.kind"]
        taught = Targets.by(source["row.ids"], source["row.logprobs"])
        if self.unaligned == "pivot":
            # One-hot rows of `tokens: dtw` are of this kind too, and have their entry.
            nothing = (kind == RowKind.NONE) & np.isneginf(taught.logprobs).all(axis=1)
            taught = taught.replaced(nothing, Targets.by(pivot["row.ids"], pivot["row.logprobs"]))
        finer = kind == RowKind.FINER
        if self.byte_order is not None:
            ranges = {"low": source["cell.low"], "high": source["cell.high"]}
            cells = Targets.by(source["cell.ids"], source["cell.logprobs"], **ranges)
            taught = taught.replaced(finer, cells.spread(finer))
        taught.partition[:] = finer
        return taught


def _require_same_pivot(pivot: Store, aligned: Store) -> None:
    ours = sha256_file(pivot.directory / MANIFEST)
    theirs = aligned.manifest["pivot_store_sha256"]
    if ours != theirs:
        raise MismatchError(
            f"{aligned.directory} was aligned to another pivot store: {theirs[:12]}… there, {ours[:12]}… is "
            f"{pivot.directory}; run the alignment again"
        )
