"""What one store is made from, and its unit of work: one shard of dialogues, encoded, scored and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.artifact import Json, write_json, write_shard
from fusechat.bytetable import ByteTable
from fusechat.config import ExtractConfig
from fusechat.encode import encode_set
from fusechat.extract.scores import Advance, RowScores, Scorer, check_scores
from fusechat.records import Dialogue, Encoded
from fusechat.store import id_dtype, make_block, shard_name, write_block
from fusechat.template import Template
from fusechat.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a process needs to make any shard of one store; it travels between processes.

    `model` is the name errors use, `directory` holds tokenizer and config (and weights, where they are needed here);
    `probe` are tokens to compare servers by; `quantized` says that the weights are not what they were trained as.
    """

    model: str
    directory: Path
    out: Path
    config: ExtractConfig
    template: Template
    vocab_size: int
    max_length_tokens: int
    dtype: str
    quantized: bool = False
    probe: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Consecutive dialogues; `first` is the place of the first one in the data set."""

    number: int
    first: int
    dialogues: Sequence[Dialogue]

    @property
    def name(self) -> str:
        """The shard's file in the store."""
        return shard_name(self.number)


Work = Callable[[Shard, Advance], Json]


@contextmanager
def open_work(task: Task, open_scorer: Callable[[Task], Any]) -> Iterator[Work]:
    """Open a task's backend here and give the function that makes a shard with it and returns the shard's note."""
    tokenizer = load_tokenizer(task.directory, trust_remote_code=task.config.trust_remote_code)
    table = ByteTable.from_tokenizer(tokenizer, task.vocab_size)
    with open_scorer(task) as scorer:
        yield lambda shard, advance: make_shard(task, tokenizer, table, scorer, shard, advance)


def make_shard(task: Task, tokenizer: Any, table: ByteTable, scorer: Scorer, shard: Shard, advance: Advance) -> Json:
    """Encode, score and write a shard and return its note, all there is of a shard of which nothing can be encoded.

    Raises DataError, naming the dialogue, for scores that cannot be.
    """
    found = encode_set(
        shard.dialogues, tokenizer, table, template=task.template, max_length_tokens=task.max_length_tokens
    )
    facts: Json = {
        "skipped": {str(shard.first + place): reason for place, reason in found.skipped.items()},
        "cut_turns": {str(shard.first + place): turns for place, turns in found.cut_turns.items()},
    }
    if not found.encoded:
        write_json(task.out / f"{shard.name}.json", facts)
        return facts
    indices = [shard.first + place for place in found.index]
    scores = scorer.score(found.encoded, indices, advance)
    check_scores(scores, indices, task.model, task.vocab_size)
    block = make_block(map(_record, indices, found.encoded, scores, [task.vocab_size] * len(indices)))
    return write_shard(
        task.out,
        shard.name,
        lambda path: write_block(path, block),
        n_dialogues=len(block),
        n_rows=len(block["row.ids"]),
        n_tokens=len(block["token.input_ids"]),
        **facts,
        engine=scorer.engine,
    )


def _record(index: int, encoded: Encoded, score: RowScores, vocab_size: int) -> dict[str, Any]:
    return {
        "dialogue.index": np.array([index], dtype=np.int64),
        "token.input_ids": encoded.input_ids,
        "token.loss_mask": encoded.loss_mask,
        "token.turn": encoded.turn,
        "token.byte_end": encoded.byte_end,
        "row.ids": score.ids.astype(id_dtype(vocab_size)),
        "row.logprobs": score.logprobs.astype(np.float16),
        "row.gold_logprob": score.gold_logprob,
    }
