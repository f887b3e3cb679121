"""What needs no vocabulary map: a source's rows behind the same bytes as the pivot's, and the chunks between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fusechat.align.rows import RowView, match_rows
from fusechat.align.tokenizer import store_vocabulary
from fusechat.artifact import MANIFEST, sha256_file
from fusechat.bytetable import ByteTable
from fusechat.errors import MismatchError
from fusechat.store import TOPK_FORMAT, Store, format_of, make_block, open_aligned, open_topk, topk_beside
from fusechat.train.targets import Array, Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """A dialogue's rows: `targets` hold the source's probabilities in descending order (objective uld) under ids that
    mean nothing, or no entry; `chunk` int64[R] and `chunk_logprob` float32[C] the chunks (objective alm)."""

    targets: Targets
    chunk: Array
    chunk_logprob: Array


class MatchedSource:
    """One source's TopKStore beside the pivot's."""

    def __init__(
        self, pivot: Store, source: Store, tables: tuple[ByteTable, ByteTable], objective: Literal["alm", "uld"]
    ) -> None:
        self.pivot = pivot
        self.source = source
        self.tables = tables
        self.objective = objective

    def at(self, dialogue: int) -> Matched:
        """Match one dialogue that both have."""
        ours, theirs = (
            RowView.of(make_block([store[dialogue]]), table)
            for store, table in zip((self.pivot, self.source), self.tables)
        )
        source_row = match_rows(ours, theirs, np.zeros(1, np.int64)).source_row
        n_rows = len(source_row)
        if self.objective == "uld":
            logprobs = np.full((n_rows, theirs.block["row.logprobs"].shape[1]), -np.inf, np.float32)
            matched = source_row >= 0
            logprobs[matched] = theirs.block["row.logprobs"][source_row[matched]]
            logprobs = -np.sort(-logprobs, axis=1)
            return Matched(
                targets=Targets.by(np.zeros(logprobs.shape), logprobs),
                chunk=np.full(n_rows, -1, np.int64),
                chunk_logprob=np.zeros(0, np.float32),
            )
        chunk, chunk_logprob = chunks(source_row, ours.turn, ours.at_end, theirs)
        return Matched(targets=Targets.nothing(n_rows), chunk=chunk, chunk_logprob=chunk_logprob)


def chunks(source_row: Array, turn: Array, at_end: Array, source: RowView) -> tuple[Array, Array]:
    """Return the chunk of each pivot row, int64[R], −1 for none, and the source's log-probability of each, float32[C].

    A chunk runs from one matched row to the next of its turn. A turn's last matched row begins a chunk only if it and
    its partner both end the turn: elsewhere, what follows it ends at different bytes.
    """
    sums = np.concatenate([[0.0], np.cumsum(source.block["row.gold_logprob"], dtype=np.float64)])
    begins = np.flatnonzero(source_row >= 0)
    chunk = np.full(len(source_row), -1, np.int64)
    logprobs: list[float] = []
    for place, row in enumerate(begins.tolist()):
        following = int(begins[place + 1]) if place + 1 < len(begins) else -1
        s = int(source_row[row])
        if following >= 0 and turn[following] == turn[row]:
            end, source_end = following, int(source_row[following])
        elif at_end[row] and source.at_end[s]:
            end, source_end = row + 1, s + 1
        else:
            continue
        chunk[row:end] = len(logprobs)
        logprobs.append(float(sums[source_end] - sums[s]))
    return chunk, np.array(logprobs, np.float32)


def open_matched(directory: Path, pivot: Store, objective: Literal["alm", "uld"]) -> MatchedSource:
    """Open the TopKStore behind a source's AlignedStore, or itself; raises MismatchError when it has changed since."""
    if format_of(directory) == TOPK_FORMAT:
        source = open_topk(directory)
    else:
        manifest = open_aligned(directory).manifest
        source = open_topk(topk_beside(directory, manifest["source_store"], directory.name))
        if sha256_file(source.directory / MANIFEST) != manifest["source_store_sha256"]:
            raise MismatchError(f"{source.directory} is not what {directory} was aligned from: run the alignment again")
    ours, theirs = (store_vocabulary(store.directory, store.manifest).table for store in (pivot, source))
    return MatchedSource(pivot, source, (ours, theirs), objective)
