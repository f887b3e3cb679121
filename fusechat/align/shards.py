"""Shards of the pivot's, one at a time, in whatever process this is: what threads here and tasks of Ray both do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fusechat.align.aligner import Aligner, align_shard, count_shard, fresh_shard
from fusechat.align.rows import Choices, RowView
from fusechat.align.statistics import PairCounts
from fusechat.align.tokenizer import store_vocabulary
from fusechat.artifact import Json, write_shard
from fusechat.bytetable import ByteTable
from fusechat.store import open_topk, shard_name, write_block
from fusechat.turn_end import turn_end_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a process must know to align any shard: the stores, where to, the five choices, and its threads."""

    pivot_store: Path
    source_store: Path
    out: Path
    chosen: dict[str, str]
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What the maps need to know of all shards together: the token that ends the pivot's turns, and counts of pairs.

    The token is None, too, where no map asks for it.
    """

    turn_end: int | None
    counts: PairCounts | None = None


class ShardWork:
    """Both stores, checked before, and their vocabularies opened, and the vocabulary maps made so far.

    Without `corpus` the pivot's store is read for the token that ends its turns, if a map asks for it.
    """

    def __init__(self, task: Task, corpus: Corpus | None = None) -> None:
        self.task = task
        self.pivot, self.source = (open_topk(store, verify=False) for store in (task.pivot_store, task.source_store))
        pivot, source = (store_vocabulary(store.directory, store.manifest) for store in (self.pivot, self.source))
        corpus = corpus or Corpus(turn_end=self._turn_end(pivot.table))
        self.aligner = Aligner(
            pivot=pivot,
            source=source,
            tokens=task.chosen["tokens"],
            vocab=task.chosen["vocab"],
            choices=Choices(**{key: task.chosen[key] for key in ("granularity", "unaligned", "collisions")}),
            threads=task.threads,
            turn_end=corpus.turn_end,
            counts=corpus.counts,
        )

    def _turn_end(self, table: ByteTable) -> int | None:
        if (self.task.chosen["tokens"], self.task.chosen["vocab"]) == ("dtw", "ms-upstream"):
            return None  # the only map there is goes by the specials' ids
        views = (RowView.of(fresh_shard(self.pivot, i), table) for i in range(self.pivot.n_shards))
        parts = ((v.block["token.input_ids"], v.block["token.turn"], v.block.offsets["token"]) for v in views)
        return turn_end_token(parts, table)

    @property
    def corpus(self) -> Corpus:
        """What is known of all shards so far."""
        return Corpus(turn_end=self.aligner.turn_end, counts=self.aligner.counts)

    def count(self, number: int) -> PairCounts:
        """Count the pairs of tokens of one shard."""
        return count_shard(self.aligner, fresh_shard(self.pivot, number), self.source)

    def write(self, number: int) -> Json:
        """Align one shard, write it, and return its note."""
        block, tally = align_shard(self.aligner, fresh_shard(self.pivot, number), self.source)
        return write_shard(
            self.task.out,
            shard_name(number),
            lambda path: write_block(path, block),
            n_dialogues=len(block),
            n_rows=len(block["row.ids"]),
            tally=tally.to_json(),
        )
