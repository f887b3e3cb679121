"""The transformers backend: hidden states of the masked rows only, then head, top-k and log-sum-exp in row chunks.

Sequences are sorted by length, so that a batch holds little padding, and a batch holds at most `batch_tokens` padded
tokens. Logits exist for one chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusechat.model import head, hidden_states
from fusechat.records import Encoded
from fusechat.store import row_positions
from fusechat.topk import topk_logprob


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScores:
    """Per row of one dialogue: ids int32[R,K], best first, logprobs float32[R,K], gold_logprob float32[R]."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    gold_logprob: npt.NDArray[np.float32]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group sequences of similar length so that longest × count ≤ `batch_tokens`; a longer sequence goes alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def score_rows(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    top_k: int,
    batch_tokens: int,
    advance: Callable[[int], None] | None = None,
) -> list[RowScores]:
    """Return the top-k and gold log-probabilities of every row of every sequence, in the order given."""
    parts = head(model)
    device = parts.weight.device
    scores: list[RowScores | None] = [None] * len(encoded)
    for batch in length_batches([len(e.input_ids) for e in encoded], batch_tokens):
        members = [encoded[i] for i in batch]
        longest = len(members[0].input_ids)
        input_ids = np.zeros((len(members), longest), dtype=np.int64)
        attention = np.zeros((len(members), longest), dtype=np.int64)
        for b, member in enumerate(members):
            input_ids[b, : len(member.input_ids)] = member.input_ids
            attention[b, : len(member.input_ids)] = 1
        hidden = hidden_states(model, torch.from_numpy(input_ids).to(device), torch.from_numpy(attention).to(device))
        positions = [row_positions(member.loss_mask) for member in members]
        flat = np.concatenate([b * longest + rows for b, rows in enumerate(positions)])
        gold = np.concatenate([member.input_ids[rows + 1] for member, rows in zip(members, positions)])
        ids, logprobs, _, gold_logprob = topk_logprob(
            hidden.flatten(0, 1)[torch.from_numpy(flat).to(device)],
            parts.weight,
            top_k,
            torch.from_numpy(gold.astype(np.int64)).to(device),
            bias=parts.bias,
            softcap=parts.softcap,
        )
        ends = np.cumsum([len(rows) for rows in positions])[:-1]
        split = [np.split(part.cpu().numpy(), ends) for part in (ids, logprobs, gold_logprob)]
        for i, row_ids, row_logprobs, row_gold in zip(batch, *split):
            scores[i] = RowScores(ids=row_ids, logprobs=row_logprobs, gold_logprob=row_gold)
        if advance is not None:
            advance(sum(len(member.input_ids) for member in members))
    return [score for score in scores if score is not None]
