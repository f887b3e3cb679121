"""Blocks of rows through the aligner against sets and sums written out: maps by leads, masses, and prefix cells."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import numpy as np
import pytest
from aligned_rows import Side
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_alignment import as_tuples, slow_match, slow_remap

from fusechat.align import RowKind
from fusechat.align.aligner import Aligner
from fusechat.align.rows import Choices, RowView
from fusechat.align.tokenizer import Vocabulary
from fusechat.align.vocabulary import VocabMap
from fusechat.bytetable import ByteTable, Role


def led_views(rng: random.Random) -> tuple[RowView, RowView, np.ndarray]:
    """Dialogues whose turns' first tokens carry a template's white space, in vocabularies with more than the texts."""
    k = rng.choice([1, 4, 9])
    sides = [Side(rng, k), Side(rng, k)]
    dialogues = [[bytes(rng.choices(b"ab \xc3", k=rng.choice([1, 2, 9]))) for _ in range(2)] for _ in range(2)]
    made = []
    for side in sides:
        cut, dummy, lead = rng.random(), rng.random() < 0.2, rng.choice([b"", b"", b" ", b"\n"])
        records = [side.encode(texts, cut, dummy, rng.random() < 0.8, lead) for texts in dialogues]
        for _ in range(20):
            side.piece(bytes(rng.choices(b"ab \n\xff", k=rng.randint(1, 3))))
        if rng.random() < 0.5:  # the bytes of another token, an end, a beginning, and the padding of an embedding
            side.tokens += [b"a", b"</s>", b"<s>", b""]
            side.roles += [Role.TEXT, Role.EOS, Role.BOS, Role.ABSENT]
        made.append(RowView.of(*side.block(records)))
    return *made, np.array([0, rng.choice([1, -1])])


def first_piece(table: ByteTable, data: bytes) -> int:
    """The longest token that the bytes begin with, the last of those; −1 if none."""
    fit = [
        (len(t), i) for i, t in enumerate(table.tokens()) if table.roles[i] == Role.TEXT and t and data.startswith(t)
    ]
    return max(fit)[1] if fit else -1


def slow_map(source: ByteTable, pivot: ByteTable, method: str, leads: tuple[bytes, bytes], end: int) -> dict[int, int]:
    def last(role: Role, token: bytes) -> int:
        return max((i for i, t in enumerate(pivot.tokens()) if t == token and pivot.roles[i] == role), default=-1)

    out = {}
    for i, token in enumerate(source.tokens()):
        data = leads[1] + token.removeprefix(leads[0])
        out[i] = {
            Role.TEXT: last(Role.TEXT, data) if data else -1,
            Role.OTHER: last(Role.OTHER, token),
            Role.BOS: last(Role.BOS, b"<s>"),
            Role.ABSENT: -1,
        }.get(Role(source.roles[i]), end)
        if out[i] < 0 and method == "prefix" and source.roles[i] == Role.TEXT:
            out[i] = first_piece(pivot, data)
    return out


def lead_of(view: RowView, row: int) -> bytes:
    token = view.table.token(int(view.gold[row]))
    if view.table.roles[view.gold[row]] != Role.TEXT or view.at_end[row]:
        return b""
    lead = token[: max(len(token) - int(view.ends[row] - view.starts[row]), 0)]
    return b"" if lead.strip() else lead


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from(["prefix", "exact"]), cells=st.booleans())
def test_rows_and_cells_are_what_the_bytes_say(seed: int, vocab: str, cells: bool) -> None:
    """Catches a lead of one tokenizer taken for the other's, cells of other prefixes, and mass doubled or lost."""
    pivot, source, partner = led_views(random.Random(seed))
    choices = Choices(granularity="cells" if cells else "first")
    sides = [Vocabulary(table=view.table, definition="") for view in (pivot, source)]
    aligner = Aligner(
        pivot=sides[0], source=sides[1], tokens="bytes", vocab=vocab, choices=choices, threads=1, turn_end=0
    )
    aligner._encode = lambda texts: [[i] for i in (first_piece(pivot.table, t.encode()) for t in texts)]
    matches, got, got_cells = aligner.align(pivot, source, partner)
    assert as_tuples(matches) == slow_match(pivot, source, partner)

    mapped = functools.cache(functools.partial(slow_map, source.table, pivot.table, end=0))
    leads = [(b"", b"")] * len(matches.kind)
    for r in np.flatnonzero((matches.source_row >= 0) & (pivot.starts == 0) & ~pivot.at_end).tolist():
        leads[r] = lead_of(source, int(matches.source_row[r])), lead_of(pivot, r)
        leads[r] = (b"", b"") if leads[r][0] == leads[r][1] else leads[r]
    maps = [mapped("prefix" if kind == RowKind.COARSER else vocab, lead) for kind, lead in zip(matches.kind, leads)]
    target = np.array([[[m[i]] for i in range(len(source.table))] for m in maps], np.int32)
    quality = np.ones(target.shape[:2], np.uint8)
    every = VocabMap(target=target, weight=np.ones(target.shape, np.float32), quality=quality)
    rows, golds, _, _ = slow_remap(matches, pivot, source, np.arange(len(maps)), every, choices)
    assert got.gold_logprob == pytest.approx(np.array(golds), abs=1e-4, nan_ok=True)
    for r, row in enumerate(rows):
        present = ~np.isneginf(got.logprobs[r])
        assert probabilities(got.ids[r][present].tolist(), got.logprobs[r][present]) == pytest.approx(row, abs=2e-3)
    if got_cells is None:
        return
    finer = np.flatnonzero(matches.kind == RowKind.FINER)
    assert len(got_cells.ids) == len(finer)
    for f, r in enumerate(finer.tolist()):
        spans = zip(got_cells.ids[f].tolist(), got_cells.low[f].tolist(), got_cells.high[f].tolist())
        cell = [frozenset(aligner.byte_order[low:high].tolist()) if high > low else i for i, low, high in spans]
        present = ~np.isneginf(got_cells.logprobs[f])
        want = slow_cells(pivot, source, r, int(matches.source_row[r]), golds[r], leads[r], mapped("prefix", leads[r]))
        found = probabilities([c for c, p in zip(cell, present) if p], got_cells.logprobs[f][present])
        assert found == pytest.approx(want, abs=2e-3)
        assert sum(found.values()) < 1.01


def probabilities(keys: list[Any], logprobs: np.ndarray) -> dict[Any, float]:
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, np.exp(logprobs.astype(np.float64)).tolist()))


def slow_cells(
    pivot: RowView, source: RowView, row: int, s: int, chain: float, leads: tuple[bytes, bytes], firsts: dict[int, int]
) -> dict[Any, float]:
    """The masses of a finer row, by single ids and by sets of the tokens that begin with a candidate's bytes."""
    candidates = dict(zip(source.block["row.ids"][s].tolist(), source.block["row.logprobs"][s].tolist()))
    masses = {i: math.exp(logprob) for i, logprob in candidates.items() if logprob > -math.inf}
    own = int(source.gold[s])
    masses[own] = math.exp(source.block["row.gold_logprob"][s]) - math.exp(chain)
    cells: dict[Any, float] = {int(pivot.gold[row]): math.exp(chain)}
    for i, mass in masses.items():
        data = leads[1] + source.table.token(i).removeprefix(leads[0])
        begin = frozenset(
            j for j, t in enumerate(pivot.table.tokens()) if pivot.table.roles[j] == Role.TEXT and t.startswith(data)
        )
        is_text = source.table.roles[i] == Role.TEXT and data
        key = begin if is_text and begin else firsts[i]
        if mass >= 2**-24 and key != -1:
            cells[key] = cells.get(key, 0.0) + mass
    return cells
