"""One shard of the pivot's, served by one source: match the rows, map the candidates, put the columns together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fusechat.align.coverage import EXAMPLES_PER_SHARD, Tally, example
from fusechat.align.rows import Choices, Matches, Remapped, RowKind, RowView, match_rows, remap_rows
from fusechat.align.tokenizer import Vocabulary
from fusechat.align.vocabulary import Encode, VocabMap, vocab_map
from fusechat.store import Array, Block, Store


@dataclass(slots=True, kw_only=True)
class Aligner:
    """Both vocabularies and the choices; the maps for turns' first tokens are made when a lead is first seen."""

    pivot: Vocabulary
    source: Vocabulary
    vocab: str
    choices: Choices
    threads: int
    _encode: Encode | None = None
    _index: dict[tuple[str, bytes, bytes], int] = field(default_factory=dict)
    _target: npt.NDArray[np.int32] = field(init=False)
    _quality: npt.NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self._target = np.empty((0, len(self.source.table)), np.int32)
        self._quality = np.empty((0, len(self.source.table)), np.uint8)

    def map_index(self, method: str, source_lead: bytes, pivot_lead: bytes) -> int:
        """Return the number of a map, making it if it is new."""
        key = (method, source_lead, pivot_lead)
        if key not in self._index:
            if self._encode is None:
                self._encode = self.pivot.continuation_encoder()
            made = vocab_map(
                self.source.table,
                self.pivot.table,
                method,
                pivot_encode=self._encode,
                source_lead=source_lead,
                pivot_lead=pivot_lead,
            )
            self._index[key] = len(self._index)
            self._target = np.concatenate([self._target, made.target[None]])
            self._quality = np.concatenate([self._quality, made.quality[None]])
        return self._index[key]

    @property
    def maps(self) -> VocabMap:
        """All maps made so far, [M,Vs]."""
        return VocabMap(target=self._target, quality=self._quality)

    def align(self, pivot: RowView, source: RowView, partner: npt.NDArray[np.int64]) -> tuple[Matches, Remapped]:
        """Match and remap one block of rows."""
        matches = match_rows(pivot, source, partner, self.threads)
        index = np.full(len(matches.kind), self.map_index(self.vocab, b"", b""), np.int16)
        coarser = matches.kind == RowKind.COARSER
        # A token that spans several of the pivot's has no twin that would do: its mass goes to the first of them.
        index[coarser] = self.map_index("prefix", b"", b"")
        self._index_leads(matches, pivot, source, index)
        maps = self.maps
        remapped = remap_rows(matches, pivot, source, index, maps.target, maps.quality, self.choices, self.threads)
        return matches, remapped

    def _index_leads(self, matches: Matches, pivot: RowView, source: RowView, index: npt.NDArray[np.int16]) -> None:
        """Choose other maps where a turn's first token carries white space in one tokenizer and not in the other."""
        rows = np.flatnonzero((matches.kind <= RowKind.FINER) & (pivot.starts == 0) & ~pivot.at_end)
        source_rows = matches.source_row[rows]
        source_leads, pivot_leads = source.lead_bytes[source_rows], pivot.lead_bytes[rows]
        for row, source_row in zip(rows[source_leads != pivot_leads], source_rows[source_leads != pivot_leads]):
            leads = source.lead(int(source_row)), pivot.lead(int(row))
            if leads[0] != leads[1]:
                method = "prefix" if matches.kind[row] == RowKind.COARSER else self.vocab
                index[row] = self.map_index(method, *leads)


def align_shard(aligner: Aligner, pivot_block: Block, source: Store) -> tuple[Block, Tally]:
    """Align one shard of the pivot's; return the aligned shard and its tally."""
    tally = Tally()
    pieces = []
    for begin, end, shard, partner in _runs(pivot_block["dialogue.index"], source):
        pivot_rows = RowView.of(pivot_block.part(begin, end), aligner.pivot.table)
        source_rows = RowView.of(source.shard(shard), aligner.source.table)
        matches, remapped = aligner.align(pivot_rows, source_rows, partner)
        tally.add(matches, remapped)
        for i in np.flatnonzero(partner >= 0)[: EXAMPLES_PER_SHARD - len(tally.examples)].tolist():
            tally.examples.append(example(pivot_rows, source_rows, matches, i, int(partner[i])))
        pieces.append(_columns(pivot_rows, source_rows, partner) | _row_columns(matches, remapped))
    columns = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    return Block(columns=columns, offsets={"row": pivot_block.offsets["row"]}), tally


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


def _row_columns(matches: Matches, remapped: Remapped) -> dict[str, Array]:
    return {
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
    np.maximum.at(last, _dialogue_of_row(view), view.turn)
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
