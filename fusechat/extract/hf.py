"""The transformers backend: hidden states of the masked rows only, then head, top-k and log-sum-exp in row chunks.

In float32 every sequence is computed alone, without padding, so that its rows are the same bytes whatever else is in
the batch, the shard or the run. In half precision sequences are sorted by length, and a batch holds at most
`batch_tokens` padded tokens. Logits exist for one chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from fusechat.config import ExtractConfig
from fusechat.errors import DataError
from fusechat.extract.batches import length_batches
from fusechat.extract.sampled import uniforms_of, weights_of_draws
from fusechat.extract.scores import Advance, RowScores, Score, Scorer
from fusechat.extract.task import Task
from fusechat.model import Head, check_head, embedding_rows, head, hidden_states, load_model
from fusechat.records import Encoded
from fusechat.store import row_positions
from fusechat.topk import drawn_logprob, topk_logprob


@contextmanager
def open_hf(task: Task) -> Iterator[Scorer]:
    """Load the task's model with transformers."""
    config = task.config
    model = load_model(
        task.directory,
        dtype=task.dtype,
        device=config.device,
        device_map=config.device_map,
        trust_remote_code=config.trust_remote_code,
    )
    if embedding_rows(model) != task.vocab_size:
        raise DataError(
            f"{task.directory} embeds {embedding_rows(model)} tokens, its config.json says {task.vocab_size}: "
            "correct vocab_size there"
        )
    check_head(model, np.arange(min(32, task.vocab_size), dtype=np.int32))
    yield Scorer(
        score=score_function(model, config, task.seed),
        engine={
            "name": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "dtype": task.dtype,
        },
    )


def score_function(model: Any, config: ExtractConfig, seed: int) -> Score:
    """Return the `score` of a Scorer with a loaded model."""

    def draw(dialogues: Sequence[int], rows: HeadRows) -> tuple[Any, Any, Any]:
        places = [dialogues[i] for i in rows.members]
        return drawn_rows(rows, uniforms_of(seed, places, rows.n_rows, config.top_k))

    def score(encoded: Sequence[Encoded], dialogues: Sequence[int], advance: Advance) -> list[RowScores]:
        sampled = config.cache == "sampled"
        pick = partial(draw, dialogues) if sampled else partial(top_rows, top_k=config.top_k)
        return score_members(model, encoded, pick, batch_tokens=config.batch_tokens, advance=advance)

    return score


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRows:
    """A batch's rows before the head.

    `members` are its sequences' places in what was to be scored, `n_rows` how many rows each has; `hidden` [R,D] is on
    the head's device, and so is `gold` int64[R], the token that follows each row.
    """

    head: Head
    members: Sequence[int]
    n_rows: Sequence[int]
    hidden: torch.Tensor
    gold: torch.Tensor


def top_rows(rows: HeadRows, *, top_k: int) -> tuple[Any, Any, Any]:
    """Return ids int32[R,K], logprobs float32[R,K] and the gold's logprob float32[R] of a batch."""
    parts = rows.head
    ids, logprobs, _, gold = topk_logprob(
        rows.hidden, parts.weight, top_k, rows.gold, bias=parts.bias, softcap=parts.softcap
    )
    return ids.cpu().numpy(), logprobs.cpu().numpy(), gold.cpu().numpy()


def drawn_rows(rows: HeadRows, uniform: npt.NDArray[np.float64]) -> tuple[Any, Any, Any]:
    """Return what `top_rows` does with draws instead of the likeliest tokens."""
    parts = rows.head
    point = torch.from_numpy(uniform).to(parts.weight.device)
    draws, gold = drawn_logprob(rows.hidden, parts.weight, point, rows.gold, bias=parts.bias, softcap=parts.softcap)
    return *weights_of_draws(draws.cpu().numpy()), gold.cpu().numpy()


def score_rows(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    top_k: int,
    batch_tokens: int,
    advance: Advance | None = None,
) -> list[RowScores]:
    """Return the top-k and gold log-probabilities of every row of every sequence, in the order given."""
    return score_members(model, encoded, partial(top_rows, top_k=top_k), batch_tokens=batch_tokens, advance=advance)


@torch.inference_mode()
def score_members(
    model: Any,
    encoded: Sequence[Encoded],
    pick: Callable[[HeadRows], tuple[Any, Any, Any]],
    *,
    batch_tokens: int,
    advance: Advance | None = None,
) -> list[RowScores]:
    """Return what `pick` makes of every sequence's rows, in the order given."""
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
        picked = pick(
            HeadRows(
                head=parts,
                members=batch,
                n_rows=[len(rows) for rows in positions],
                hidden=hidden.flatten(0, 1)[torch.from_numpy(flat).to(hidden.device)].to(device),
                gold=torch.from_numpy(gold.astype(np.int64)).to(device),
            )
        )
        ends = np.cumsum([len(rows) for rows in positions])[:-1]
        split = [np.split(part, ends) for part in picked]
        for i, row_ids, row_logprobs, row_gold in zip(batch, *split):
            scores[i] = RowScores(ids=row_ids, logprobs=row_logprobs, gold_logprob=row_gold)
        if advance is not None:
            advance(sum(len(member.input_ids) for member in members))
    return [score for score in scores if score is not None]
