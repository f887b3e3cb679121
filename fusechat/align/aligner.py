"""One shard of the pivot's, served by one source: match the rows, map the candidates, put the columns together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fusechat.align.cells import CellMap, CellRows, byte_order, cell_map, cell_rows
from fusechat.align.coverage import EXAMPLES_PER_SHARD, Tally, example
from fusechat.align.rows import Choices, Matches, Remapped, RowKind, RowView, match_rows, remap_rows
from fusechat.align.statistics import PairCounts, no_counts
from fusechat.align.tokenizer import Vocabulary
from fusechat.align.vocabulary import Encode, VocabMap, stack_maps, vocab_map
from fusechat.align.warper import Warper
from fusechat.store import Array, Block, Store, map_block


@dataclass(slots=True, kw_only=True)
class Aligner:
    """Both vocabularies and the choices; the maps for turns' first tokens are made when a lead is first seen.

    `turn_end` is the token that ends the pivot's turns, None where none does or no map asks for it.
    """

    pivot: Vocabulary
    source: Vocabulary
    tokens: str
    vocab: str
    choices: Choices
    threads: int
    turn_end: int | None
    counts: PairCounts | None = None
    _encode: Encode | None = None
    _index: dict[tuple[str, bytes, bytes], int] = field(default_factory=dict)
    _maps: list[VocabMap] = field(default_factory=list)
    _cells: dict[tuple[bytes, bytes], CellMap] = field(default_factory=dict)
    _order: npt.NDArray[np.int32] | None = None
    _stacked: VocabMap | None = None
    _warper: Warper | None = None

    def map_index(self, method: str, source_lead: bytes, pivot_lead: bytes) -> int:
        """Return the number of a map, making it if it is new."""
        key = (method, source_lead, pivot_lead)
        if key not in self._index:
            if self._encode is None and method not in ("exact", "mined", "ms-upstream"):
                self._encode = self.pivot.continuation_encoder()
            upstream = method == "ms-upstream"
            prefix = None
            if method in ("ms", "ms-soft"):
                prefix = self._maps[self.map_index("prefix", source_lead, pivot_lead)]
            made = vocab_map(
                self.source.table,
                self.pivot.table,
                method,
                counts=self.counts,
                pivot_encode=self._encode,
                source_spelling=self.source.spelling() if upstream else None,
                pivot_spelling=self.pivot.spelling() if upstream else None,
                source_lead=source_lead,
                pivot_lead=pivot_lead,
                pivot_end=self.turn_end,
                prefix=prefix,
                threads=self.threads,
            )
            self._index[key] = len(self._maps)
            self._maps.append(made)
            self._stacked = None
        return self._index[key]

    @property
    def maps(self) -> VocabMap:
        """All maps made so far, stacked."""
        if self._stacked is None:
            self._stacked = stack_maps(self._maps)
        return self._stacked

    @property
    def warper(self) -> Warper:
        """What warps this pair of vocabularies."""
        if self._warper is None:
            self._warper = Warper.of(self.source, self.pivot)
        return self._warper

    @property
    def byte_order(self) -> npt.NDArray[np.int32]:
        """The pivot's ids in the order of their bytes (fusechat.align.cells)."""
        if self._order is None:
            self._order = byte_order(self.pivot.table)
        return self._order

    def cell_maps(self) -> list[CellMap]:
        """Return the cell map of every map made so far, under its leads."""
        for _, *leads in list(self._index):
            key = (leads[0], leads[1])
            if key not in self._cells:
                target = self._maps[self.map_index("prefix", *key)].target[:, 0]
                self._cells[key] = cell_map(
                    self.source.table,
                    self.pivot.table,
                    self.byte_order,
                    target,
                    source_lead=key[0],
                    pivot_lead=key[1],
                )
        return [self._cells[source_lead, pivot_lead] for _, source_lead, pivot_lead in self._index]

    def count(self, pivot: RowView, source: RowView, partner: npt.NDArray[np.int64]) -> PairCounts:
        """Count which tokens stand against each other: on a warping path, or behind the same bytes."""
        if self.tokens == "dtw":
            return self.warper.count(pivot, source, partner)
        matches = match_rows(pivot, source, partner, self.threads)
        rows = np.flatnonzero((matches.source_row >= 0) & ~pivot.at_end)
        return PairCounts.of(source.gold[matches.source_row[rows]].astype(np.int64), pivot.gold[rows].astype(np.int64))

    def align(
        self, pivot: RowView, source: RowView, partner: npt.NDArray[np.int64]
    ) -> tuple[Matches, Remapped, CellRows | None]:
        """Match and remap one block of rows; with `granularity: cells`, also give the finer rows' cells."""
        if self.tokens == "dtw":
            index = self.map_index(self.vocab, b"", b"")
            return *self.warper.align(pivot, source, partner, index, self.maps, self.choices, self.threads), None
        matches = match_rows(pivot, source, partner, self.threads)
        row_maps = np.full(len(matches.kind), self.map_index(self.vocab, b"", b""), np.int16)
        coarser = matches.kind == RowKind.COARSER
        # A token that spans several of the pivot's has no twin that would do: its mass goes to the first of them.
        row_maps[coarser] = self.map_index("prefix", b"", b"")
        self._index_leads(matches, pivot, source, row_maps)
        remapped = remap_rows(matches, pivot, source, row_maps, self.maps, self.choices, self.threads)
        if self.choices.granularity != "cells":
            return matches, remapped, None
        return matches, remapped, cell_rows(matches, remapped, pivot, source, row_maps, self.cell_maps())

    def _index_leads(self, matches: Matches, pivot: RowView, source: RowView, index: npt.NDArray[np.int16]) -> None:
        """Choose other maps where a turn's first token carries white space in one tokenizer and not in the other."""
        rows = np.flatnonzero((matches.kind <= RowKind.FINER) & (pivot.starts == 0) & ~pivot.at_end)
        source_rows = matches.source_row[rows]
        # Of one width they may differ still: a line break here, a space there.
        led = np.maximum(source.lead_bytes[source_rows], pivot.lead_bytes[rows]) > 0
        for row, source_row in zip(rows[led], source_rows[led]):
            leads = source.lead(int(source_row)), pivot.lead(int(row))
            if leads[0] != leads[1]:
                method = "prefix" if matches.kind[row] == RowKind.COARSER else self.vocab
                index[row] = self.map_index(method, *leads)


def fresh_shard(store: Store, number: int) -> Block:
    """Map one shard anew: the store's own maps would keep every page they ever touched for as long as it is open."""
    return map_block(store.directory / store.manifest["shards"][number]["file"])


def count_shard(aligner: Aligner, pivot_block: Block, source: Store) -> PairCounts:
    """Count the pairs of tokens of one shard of the pivot's."""
    counts = no_counts()
    for begin, end, shard, partner in _runs(pivot_block["dialogue.index"], source):
        pivot_rows = RowView.of(pivot_block.part(begin, end), aligner.pivot.table)
        counts += aligner.count(pivot_rows, RowView.of(fresh_shard(source, shard), aligner.source.table), partner)
    return counts


def align_shard(aligner: Aligner, pivot_block: Block, source: Store) -> tuple[Block, Tally]:
    """Align one shard of the pivot's; return the aligned shard and its tally."""
    tally = Tally()
    pieces = []
    for begin, end, shard, partner in _runs(pivot_block["dialogue.index"], source):
        pivot_rows = RowView.of(pivot_block.part(begin, end), aligner.pivot.table)
        source_rows = RowView.of(fresh_shard(source, shard), aligner.source.table)
        matches, remapped, cells = aligner.align(pivot_rows, source_rows, partner)
        tally.add(matches, remapped)
        for i in np.flatnonzero(partner >= 0)[: EXAMPLES_PER_SHARD - len(tally.examples)].tolist():
            tally.examples.append(example(pivot_rows, source_rows, matches, i, int(partner[i])))
        pieces.append(_columns(pivot_rows, source_rows, partner) | _row_columns(matches, remapped, cells))
    columns = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    rows = pivot_block.offsets["row"]
    offsets = {"row": rows}
    if aligner.choices.granularity == "cells":
        finer = np.cumsum(np.append(0, columns["row.kind"] == RowKind.FINER))
        offsets["cell"] = finer[rows]
    return Block(columns=columns, offsets=offsets), tally


def _runs(dialogues: npt.NDArray[np.int64], source: Store) -> Iterator[tuple[int, int, int, npt.NDArray[np.int64]]]:
    """Yield (begin, end, source shard, partner of each dialogue) for runs of dialogues that one source shard serves."""
    places = [source.place(index) if index in source else (-1, -1) for index in dialogues.tolist()]
    shards, partner = np.array(places, np.int64).reshape(-1, 2).T
    # A dialogue that the source skipped needs no shard of its own: it joins the run before it.
    known = np.flatnonzero(shards >= 0)
    before = np.searchsorted(known, np.arange(len(shards)), side="right") - 1
    shards = shards[known[np.maximum(before, 0)]] if len(known) else np.zeros_like(shards)
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]):
        yield begin, end, int(shards[begin]), np.ascontiguousarray(partner[begin:end])


def _row_columns(matches: Matches, remapped: Remapped, cells: CellRows | None) -> dict[str, Array]:
    columns = {} if cells is None else {f"cell.{name}": column for name, column in cells._asdict().items()}
    return columns | {
        "row.ids": remapped.ids,
        "row.logprobs": remapped.logprobs,
        "row.kind": matches.kind,
        "row.gold_logprob": remapped.gold_logprob,
    }


def _columns(pivot: RowView, source: RowView, partner: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Return both models' negative log-likelihoods over the messages that both encoded, with their sizes.

    A dialogue that one side had to cut is compared on what is left of it; where the source lacks it, its NLL is NaN.
    """
    has_partner = partner >= 0
    source_of = np.where(has_partner, partner, 0)
    limit = _last_turn(pivot)
    limit = np.where(has_partner, np.minimum(limit, _last_turn(source)[source_of]), limit)
    source_limit = np.full(len(source.block), -1, np.int64)
    source_limit[partner[has_partner]] = limit[has_partner]
    pivot_nll, pivot_tokens, content_bytes = _totals(pivot, limit)
    source_nll, source_tokens, _ = (values[source_of] for values in _totals(source, source_limit))
    return {
        "dialogue.index": pivot.block["dialogue.index"],
        "dialogue.source_nll": np.where(has_partner, source_nll, np.nan).astype(np.float32),
        "dialogue.pivot_nll": pivot_nll.astype(np.float32),
        "dialogue.source_tokens": np.where(has_partner, source_tokens, 0).astype(np.int32),
        "dialogue.pivot_tokens": pivot_tokens.astype(np.int32),
        "dialogue.content_bytes": content_bytes.astype(np.int32),
    }


def _dialogue_of_row(view: RowView) -> npt.NDArray[np.int64]:
    return np.repeat(np.arange(len(view.block)), np.diff(view.block.offsets["row"]))


def _last_turn(view: RowView) -> npt.NDArray[np.int64]:
    last = np.full(len(view.block), -1, np.int64)
    rows = view.block.offsets["row"]
    taught = np.diff(rows) > 0
    if taught.any():
        last[taught] = np.maximum.reduceat(view.turn, rows[:-1][taught])
    return last


def _totals(view: RowView, limit: npt.NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Return each dialogue's NLL in nats, rows, and bytes of content over its turns up to `limit`."""
    dialogue = _dialogue_of_row(view)
    counted = view.turn <= limit[dialogue]
    n = len(view.block)
    nll = np.bincount(dialogue, -np.where(counted, view.block["row.gold_logprob"], 0).astype(np.float64), n)
    rows = np.bincount(dialogue, counted, n)
    is_last = np.ones(len(dialogue), np.bool_)
    is_last[:-1] = (np.diff(view.turn) != 0) | (np.diff(dialogue) != 0)
    content_bytes = np.bincount(dialogue, np.where(counted & is_last, view.ends, 0), n)
    return nll, rows, content_bytes
