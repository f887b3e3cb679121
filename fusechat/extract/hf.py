"""The transformers backend: hidden states of the masked rows only, then head, top-k and log-sum-exp in row chunks.

In float32 every sequence is computed alone, without padding, so that its rows are the same bytes whatever else is in
the batch, the shard or the run. In half precision sequences are sorted by length, and a batch holds at most
`batch_tokens` padded tokens. Logits exist for one chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from fusechat.errors import DataError
from fusechat.extract.scores import Advance, RowScores, Scorer
from fusechat.extract.task import Task
from fusechat.model import check_head, embedding_rows, head, hidden_states, load_model
from fusechat.records import Encoded
from fusechat.store import row_positions
from fusechat.topk import topk_logprob


@contextmanager
def open_hf(task: Task) -> Iterator[Scorer]:
    """Load the task's model with transformers."""
    config = task.config
    model = load_model(task.directory, dtype=task.dtype, device=config.device, device_map=config.device_map)
    if embedding_rows(model) != task.vocab_size:
        raise DataError(
            f"{task.directory} embeds {embedding_rows(model)} tokens, its config.json says {task.vocab_size}: "
            "correct vocab_size there"
        )
    check_head(model, np.arange(min(32, task.vocab_size), dtype=np.int32))

    def score(encoded: Sequence[Encoded], dialogues: Sequence[int], advance: Advance) -> list[RowScores]:
        return score_rows(model, encoded, top_k=config.top_k, batch_tokens=config.batch_tokens, advance=advance)

    yield Scorer(
        score=score,
        engine={
            "name": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "dtype": task.dtype,
        },
    )


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
    alone = parts.weight.dtype == torch.float32
    lengths = [len(e.input_ids) for e in encoded]
    for batch in ([i] for i in range(len(encoded))) if alone else length_batches(lengths, batch_tokens):
        members = [encoded[i] for i in batch]
        longest = len(members[0].input_ids)
        input_ids = np.zeros((len(members), longest), dtype=np.int64)
        attention = np.zeros((len(members), longest), dtype=np.int64)
        for b, member in enumerate(members):
            input_ids[b, : len(member.input_ids)] = member.input_ids
            attention[b, : len(member.input_ids)] = 1
        hidden = hidden_states(
            model, torch.from_numpy(input_ids).to(model.device), torch.from_numpy(attention).to(model.device)
        )
        positions = [row_positions(member.loss_mask) for member in members]
        flat = np.concatenate([b * longest + rows for b, rows in enumerate(positions)])
        gold = np.concatenate([member.input_ids[rows + 1] for member, rows in zip(members, positions)])
        ids, logprobs, _, gold_logprob = topk_logprob(
            hidden.flatten(0, 1)[torch.from_numpy(flat).to(hidden.device)].to(device),
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
