"""Batches of examples: padded tokens, flat sparse targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fusechat.train.dataset import Example
from fusechat.train.targets import Array


def collate(examples: list[Example], pad_token_id: int) -> dict[str, Any]:
    """Batch examples: padded tokens int64[B,S], and the targets of all rows as flat arrays [R,K].

    `rows` int64[R] index the flattened [B·S] positions; absent targets have id −1. No dense target is ever built.
    """
    longest = max(len(e.input_ids) for e in examples)
    width = max(e.targets.ids.shape[1] for e in examples)

    def padded(values: list[Array], fill: int) -> torch.Tensor:
        out = np.full((len(values), longest), fill, dtype=np.int64)
        for b, value in enumerate(values):
            out[b, : len(value)] = value
        return torch.from_numpy(out)

    targets = [e.targets.widened(width) for e in examples]

    def rows(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(t, name) for t in targets]))

    logprobs = rows("logprobs")
    return {
        "input_ids": padded([e.input_ids for e in examples], pad_token_id),
        "attention_mask": padded([np.ones(len(e.input_ids), dtype=np.int64) for e in examples], 0),
        "labels": padded([e.labels for e in examples], -100),
        "rows": torch.from_numpy(np.concatenate([b * longest + e.rows for b, e in enumerate(examples)])),
        "target_ids": torch.where(torch.isneginf(logprobs), -1, rows("ids")),
        "target_logprobs": logprobs,
        "target_low": rows("low"),
        "target_high": rows("high"),
        "partition": rows("partition"),
        "hard_weight": torch.from_numpy(np.concatenate([e.hard_weight for e in examples])),
    }
