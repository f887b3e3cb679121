"""Training examples: the pivot's tokens, and for every row the distribution that is to be taught there.

For a dialogue the distribution is the source's, aligned to the pivot, or the pivot's own: with `min_ce` whichever had
the lower cross-entropy on the dialogue's own text (arXiv 2408.07990, §3.2; ties go to the pivot).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusechat.align import RowKind
from fusechat.artifact import MANIFEST, sha256_file
from fusechat.errors import MismatchError
from fusechat.store import Store, row_positions

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One dialogue.

    input_ids int64[T]; labels int64[T], −100 where not the assistant's; rows int64[R], the positions that predict an
    assistant token; ids int64[R,K], −1 absent; logprobs float32[R,K]; partition bool[R], true where the ids are cells
    of a partition, so that the missing mass is its last cell; hard_weight float32[R], λ, or 1 where nothing is taught.
    """

    input_ids: Array
    labels: Array
    rows: Array
    ids: Array
    logprobs: Array
    partition: Array
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
        ce_unit: Literal["byte", "token"] = "byte",
    ) -> None:
        self.pivot = pivot
        self.aligned = aligned
        self.hard_weight = hard_weight
        self.indices = sorted(pivot)
        self.unaligned = ""
        if aligned is not None:
            _require_same_pivot(pivot, aligned)
            self.unaligned = aligned.manifest["unaligned"]
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

    def lengths(self) -> list[int]:
        """Return every example's number of tokens."""
        return [len(self.pivot[i]["token.input_ids"]) for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Example:
        dialogue = self.indices[position]
        record = self.pivot[dialogue]
        mask = record["token.loss_mask"]
        input_ids = record["token.input_ids"].astype(np.int64)
        rows = row_positions(mask)
        ids, logprobs = record["row.ids"], record["row.logprobs"]
        partition = np.zeros(len(rows), dtype=np.bool_)
        hard_weight = np.full(len(rows), self.hard_weight, dtype=np.float32)
        if self.aligned is not None and self.from_source[dialogue]:
            ids, logprobs, partition, taught = self._source_rows(dialogue, ids, logprobs)
            hard_weight[~taught] = 1.0
        if self.aligned is None:
            ids, logprobs = ids[:, :0], logprobs[:, :0]
            hard_weight[:] = 1.0
        return Example(
            input_ids=input_ids,
            labels=np.where(mask, input_ids, -100),
            rows=rows,
            ids=np.where(np.isneginf(logprobs), -1, ids.astype(np.int64)),
            logprobs=logprobs.astype(np.float32),
            partition=partition,
            hard_weight=hard_weight,
        )

    def _source_rows(self, dialogue: int, pivot_ids: Array, pivot_logprobs: Array) -> tuple[Array, Array, Array, Array]:
        """The source's rows; where it has none, what `unaligned` asks for (`gold` rows are in the store already)."""
        assert self.aligned is not None
        record = self.aligned[dialogue]
        kind = record["row.kind"]
        ids, logprobs = record["row.ids"], record["row.logprobs"]
        none = kind == RowKind.NONE
        partition = kind == RowKind.FINER
        taught = np.isfinite(logprobs).any(axis=1)
        if self.unaligned == "pivot" and none.any():
            ids, logprobs = _widen(ids, logprobs, pivot_ids.shape[1])
            pivot_ids, pivot_logprobs = _widen(pivot_ids, pivot_logprobs, ids.shape[1])
            ids = np.where(none[:, None], pivot_ids, ids)
            logprobs = np.where(none[:, None], pivot_logprobs, logprobs)
            taught |= none
        return ids, logprobs, partition, np.asarray(taught)


def _require_same_pivot(pivot: Store, aligned: Store) -> None:
    ours = sha256_file(pivot.directory / MANIFEST)
    theirs = aligned.manifest["pivot_store_sha256"]
    if ours != theirs:
        raise MismatchError(
            f"{aligned.directory} was aligned to another pivot store: {theirs[:12]}… there, {ours[:12]}… is "
            f"{pivot.directory}; run the alignment again"
        )


def _widen(ids: Array, logprobs: Array, width: int) -> tuple[Array, Array]:
    missing = max(width - ids.shape[1], 0)
    return (
        np.pad(ids, ((0, 0), (0, missing))),
        np.pad(logprobs, ((0, 0), (0, missing)), constant_values=-np.inf),
    )


def collate(examples: list[Example], pad_token_id: int) -> dict[str, Any]:
    """Batch examples: padded tokens int64[B,S], and the targets of all rows as flat sparse arrays [R,K].

    `rows` int64[R] index the flattened [B·S] positions. No dense target is ever built.
    """
    import torch

    longest = max(len(e.input_ids) for e in examples)
    width = max(e.ids.shape[1] for e in examples)

    def padded(values: list[Array], fill: int) -> torch.Tensor:
        out = np.full((len(values), longest), fill, dtype=np.int64)
        for b, value in enumerate(values):
            out[b, : len(value)] = value
        return torch.from_numpy(out)

    targets = [_widen(e.ids + 1, e.logprobs, width) for e in examples]  # +1: padding becomes id −1 below
    return {
        "input_ids": padded([e.input_ids for e in examples], pad_token_id),
        "attention_mask": padded([np.ones(len(e.input_ids), dtype=np.int64) for e in examples], 0),
        "labels": padded([e.labels for e in examples], -100),
        "rows": torch.from_numpy(np.concatenate([b * longest + e.rows for b, e in enumerate(examples)])),
        "target_ids": torch.from_numpy(np.concatenate([ids for ids, _ in targets]) - 1),
        "target_logprobs": torch.from_numpy(np.concatenate([logprobs for _, logprobs in targets])),
        "partition": torch.from_numpy(np.concatenate([e.partition for e in examples])),
        "hard_weight": torch.from_numpy(np.concatenate([e.hard_weight for e in examples])),
    }
