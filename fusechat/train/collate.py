"""Micro-batches of examples: padded or packed tokens, flat sparse targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fusechat.loss import IGNORE_LABEL
from fusechat.train.dataset import Example
from fusechat.train.targets import Array


def collate(examples: Sequence[Example], pad_token_id: int, *, packing: bool = False) -> dict[str, Any]:
    """Batch examples: tokens int64[B,S], and the targets of all their rows as flat arrays [R,K].

    `rows` int64[R] index the flattened [B·S] positions; absent targets have id −1. No dense target is ever built. With
    `packing` the dialogues stand behind each other in one row without padding, and `position_ids` start again at each:
    by these, transformers keeps attention within a dialogue. No examples at all make a batch of one token and no row.
    """
    lengths = np.array([len(e.input_ids) for e in examples], dtype=np.int64)
    if not len(examples):
        tokens = _padded_tokens([np.array([pad_token_id])], [np.array([IGNORE_LABEL])], 1, pad_token_id)
        starts = lengths
    elif packing:
        starts = np.cumsum(lengths) - lengths
        tokens = {
            "input_ids": torch.from_numpy(np.concatenate([e.input_ids for e in examples]))[None],
            "labels": torch.from_numpy(np.concatenate([e.labels for e in examples]))[None],
            "position_ids": torch.from_numpy(np.arange(lengths.sum()) - np.repeat(starts, lengths))[None],
        }
    else:
        longest = int(lengths.max())
        starts = np.arange(len(examples)) * longest
        ids, labels = [e.input_ids for e in examples], [e.labels for e in examples]
        tokens = _padded_tokens(ids, labels, longest, pad_token_id)
    columns = {name: torch.from_numpy(column) for name, column in _row_columns(examples, starts).items()}
    return {**tokens, **columns, "dialogue": [e.dialogue for e in examples]}


def _padded_tokens(ids: list[Array], labels: list[Array], width: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    def padded(values: list[Array], fill: int) -> torch.Tensor:
        out = np.full((len(values), width), fill, dtype=np.int64)
        for b, value in enumerate(values):
            out[b, : len(value)] = value
        return torch.from_numpy(out)

    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([np.ones(len(value), dtype=np.int64) for value in ids], 0),
        "labels": padded(labels, IGNORE_LABEL),
    }


def _row_columns(examples: Sequence[Example], starts: Array) -> dict[str, Array]:
    n_rows = sum(len(e.rows) for e in examples)
    width = max((e.targets.width for e in examples), default=0)
    ranges = any(e.targets.cells is not None for e in examples)
    columns: dict[str, Array] = {
        "rows": np.empty(n_rows, dtype=np.int64),
        "row_labels": np.empty(n_rows, dtype=np.int64),
        "target_ids": np.zeros((n_rows, width), dtype=np.int32),
        "target_logprobs": np.full((n_rows, width), -np.inf, dtype=_logprob_dtype(examples)),
        "partition": np.empty(n_rows, dtype=np.bool_),
        "row_weight": np.empty(n_rows, dtype=np.float32),
        "taught": np.empty(n_rows, dtype=np.float32),
        "origin": np.empty(n_rows, dtype=np.int64),
    }
    if ranges:
        columns |= {name: np.zeros((n_rows, width), dtype=np.int32) for name in ("target_low", "target_high")}
    begin = 0
    for start, e in zip(starts.tolist(), examples):
        part, k, targets = slice(begin, begin + len(e.rows)), e.targets.ids.shape[1], e.targets
        ids, logprobs = columns["target_ids"][part], columns["target_logprobs"][part]
        np.add(e.rows, start, out=columns["rows"][part])
        columns["row_labels"][part] = e.input_ids[e.rows + 1]
        logprobs[:, :k], ids[:, :k] = targets.logprobs, targets.ids
        if (cells := targets.cells) is not None:
            at, k = np.flatnonzero(targets.partition), cells.ids.shape[1]
            ids[at, :k], logprobs[at, :k], logprobs[at, k:] = cells.ids, cells.logprobs, -np.inf
            columns["target_low"][part][at, :k], columns["target_high"][part][at, :k] = cells.low, cells.high
        columns["partition"][part] = targets.partition
        columns["row_weight"][part], columns["taught"][part] = e.row_weight, e.taught
        columns["origin"][part] = e.origin
        begin = part.stop
    # torch converts half precision ten times as fast as NumPy.
    columns["target_logprobs"] = torch.from_numpy(columns["target_logprobs"]).float().numpy()
    columns["target_ids"] |= -(columns["target_logprobs"] == -np.inf).view(np.int8)  # −1 | id = −1
    if any(e.chunk is not None for e in examples):
        columns |= _chunk_columns(examples)
    return columns


def _logprob_dtype(examples: Sequence[Example]) -> np.dtype[Any]:
    return np.result_type(*(e.targets.logprobs for e in examples)) if len(examples) else np.dtype(np.float32)


def _chunk_columns(examples: Sequence[Example]) -> dict[str, Array]:
    """Number the chunks of all examples through."""
    chunks, logprobs, first = [], [], 0
    for e in examples:
        assert e.chunk is not None
        assert e.chunk_logprob is not None
        chunks.append(np.where(e.chunk >= 0, e.chunk + first, -1))
        logprobs.append(e.chunk_logprob)
        first += len(e.chunk_logprob)
    return {"chunk": np.concatenate(chunks), "chunk_logprob": np.concatenate(logprobs)}
