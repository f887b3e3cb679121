"""Matching and remapping of rows: both engines against slow references, on random texts in random tokenizations."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align import RowKind
from fusechat.align.rows import Choices, Matches, Remapped, RowView, match_rows, remap_rows
from fusechat.align.vocabulary import VocabMap, stack_maps
from fusechat.bytetable import ByteTable, Role, token_byte_ends
from fusechat.errors import FormatError
from fusechat.store import Block, make_block

END, SPACE = "<end>", "<dummy>"


@pytest.fixture(params=["require", "off"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled engine (when built) and on the numba fallback."""
    if request.param == "require":
        pytest.importorskip("fusechat._native", reason="the compiled engine is not built")
    monkeypatch.setenv("FUSECHAT_NATIVE", request.param)
    return str(request.param)


class Side:
    """One model's view of dialogues: a vocabulary grown as texts are cut, and the columns of a TopKStore."""

    def __init__(self, rng: random.Random, k: int = 4) -> None:
        self.rng, self.k = rng, k
        self.pieces: dict[bytes, int] = {}
        self.tokens: list[bytes] = [b"<|im_end|>", b"<header>"]
        self.roles: list[int] = [Role.TURN, Role.OTHER]

    def piece(self, data: bytes) -> int:
        if data not in self.pieces:
            self.pieces[data] = len(self.tokens)
            self.tokens.append(data)
            self.roles.append(Role.TEXT)
        return self.pieces[data]

    def encode(self, texts: list[bytes], cut: float, dummy: bool, end: bool) -> dict[str, Any]:
        ids, mask, turn, byte_end = [1], [False], [-1], [-1]

        def put(token: int, m: bool, t: int, e: int) -> None:
            ids.append(token), mask.append(m), turn.append(t), byte_end.append(e)

        for t, text in enumerate(texts):
            if dummy:
                put(self.piece(b" "), True, t, 0)
            bounds = [0, *(i for i in range(1, len(text)) if self.rng.random() < cut), len(text)] if text else [0]
            for a, b in itertools.pairwise(bounds):
                put(self.piece(text[a:b]), True, t, b)
            if end:
                put(0, True, t, len(text))
            put(1, False, -1, -1)
        return {
            "token.input_ids": np.array(ids, np.int32),
            "token.loss_mask": np.array(mask),
            "token.turn": np.array(turn, np.int32),
            "token.byte_end": np.array(byte_end, np.int32),
        }

    def block(self, records: list[dict[str, Any]], dtype: Any = np.uint16) -> tuple[Block, ByteTable]:
        """Give the records random top-k rows that hold the gold token most of the time."""
        for index, record in enumerate(records):
            gold = record["token.input_ids"][1:][record["token.loss_mask"][1:]]
            ids = np.zeros((len(gold), self.k), dtype)
            logprobs = np.full((len(gold), self.k), -np.inf, np.float16)
            gold_logprob = np.zeros(len(gold), np.float32)
            for r, g in enumerate(gold.tolist()):
                chosen = self.rng.sample(range(len(self.tokens)), min(self.k, len(self.tokens)))
                if self.rng.random() < 0.8 and g not in chosen:
                    chosen[self.rng.randrange(len(chosen))] = g
                weights = np.array(sorted((self.rng.random() ** 4 + 1e-4 for _ in chosen), reverse=True))
                p = weights / weights.sum() * self.rng.uniform(0.5, 1)
                ids[r, : len(chosen)], logprobs[r, : len(chosen)] = chosen, np.log(p)
                gold_logprob[r] = logprobs[r, chosen.index(g)] if g in chosen else math.log(1e-5)
            record |= {
                "dialogue.index": np.array([index], np.int64),
                "row.ids": ids,
                "row.logprobs": logprobs,
                "row.gold_logprob": gold_logprob,
            }
        return make_block(records), ByteTable.from_tokens(self.tokens, self.roles)


def views(seed: int, k: int = 4) -> tuple[RowView, RowView, np.ndarray]:
    """Random dialogues over a tiny alphabet in two random tokenizations, some missing on the source's side."""
    rng = random.Random(seed)
    pivot, source = Side(rng, k), Side(rng, k)
    pivot_records, source_records, partner = [], [], []
    for _ in range(rng.randint(1, 4)):
        texts = [bytes(rng.choices(b"ab \xc3", k=rng.choice([0, 1, 2, 7, 30]))) for _ in range(rng.randint(1, 3))]
        ends, dummies = [rng.random() < 0.8 for _ in "ps"], [rng.random() < 0.3 for _ in "ps"]
        pivot_records.append(pivot.encode(texts, rng.random(), dummies[0], ends[0]))
        if rng.random() < 0.85:
            partner.append(len(source_records))
            cut = texts[: rng.randint(1, len(texts))] if rng.random() < 0.2 else texts
            record = source.encode(cut, rng.random(), dummies[1], ends[1])
            if rng.random() < 0.2:  # broken off inside a turn
                stop = rng.randint(1, len(record["token.turn"]))
                record = {key: values[:stop] for key, values in record.items()}
            source_records.append(record)
        else:
            partner.append(-1)
    if not source_records:
        source_records.append(source.encode([b"a"], 0.5, False, True))
    pivot_block, pivot_table = pivot.block(pivot_records)
    source_block, source_table = source.block(source_records, np.int32 if rng.random() < 0.5 else np.uint16)
    return (
        RowView.of(pivot_block, pivot_table),
        RowView.of(source_block, source_table),
        np.array(partner, np.int64),
    )


def rows_of(view: RowView, dialogue: int) -> list[dict[str, Any]]:
    """A dialogue's rows, read off its token columns one by one."""
    record = view.block.at(dialogue)
    ids, turn, end = record["token.input_ids"], record["token.turn"], record["token.byte_end"]
    rows = []
    for t in range(len(ids) - 1):
        if not record["token.loss_mask"][t + 1]:
            continue
        start = int(end[t]) if turn[t] == turn[t + 1] else 0
        role = view.table.role(int(ids[t + 1]))
        what = "wide" if end[t + 1] > start else "zero" if role == Role.TEXT else "end"
        rows.append({"key": (int(turn[t + 1]), start), "end": int(end[t + 1]), "what": what})
    return rows


def slow_match(pivot: RowView, source: RowView, partner: np.ndarray) -> list[tuple[int, int, int, int]]:
    """For every pivot row (kind, source row, chain, rest), by searching all source rows of its dialogue."""
    found = []
    for d, s in enumerate(partner.tolist()):
        source_rows = rows_of(source, s) if s >= 0 else []
        first = int(source.block.offsets["row"][s]) if s >= 0 else 0
        taken: set[int] = set()
        for row in rows_of(pivot, d):
            hit = next(
                (
                    i
                    for i, r in enumerate(source_rows)
                    if i not in taken and r["key"] == row["key"] and r["what"] == row["what"]
                ),
                None,
            )
            if hit is None:
                found.append((RowKind.NONE, -1, 0, 0))
                continue
            taken.add(hit)
            end = source_rows[hit]["end"]
            if row["what"] != "wide" or end >= row["end"]:
                kind = RowKind.COARSER if end > row["end"] and row["what"] == "wide" else RowKind.SAME
                found.append((kind, first + hit, 1, 0))
                continue
            last = hit
            while last < len(source_rows) and source_rows[last]["end"] < row["end"]:
                last += 1
            turn = row["key"][0]
            if last == len(source_rows) or source_rows[last]["key"][0] != turn:
                found.append((RowKind.NONE, -1, 0, 0))
                continue
            beyond = source_rows[last]["end"] > row["end"]
            rest = row["end"] - source_rows[last]["key"][1] if beyond else 0
            found.append((RowKind.FINER, first + hit, last - hit + 1, rest))
    return found


def as_tuples(m: Matches) -> list[tuple[int, int, int, int]]:
    return list(zip(m.kind.tolist(), m.source_row.tolist(), m.chain.tolist(), m.rest_bytes.tolist()))


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_matching_is_the_search_through_all_rows(seed: int) -> None:
    """Catches a pointer that runs past a boundary, end tokens paired with text, chains that stop short or overrun."""
    pivot, source, partner = views(seed)
    slow = slow_match(pivot, source, partner)
    for choice in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSECHAT_NATIVE", choice)
            for threads in (1, 3):
                assert as_tuples(match_rows(pivot, source, partner, threads)) == slow


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_matched_rows_share_their_prefix(seed: int) -> None:
    """Catches any pair whose models have not read the same bytes of the same message (the rule alignment stands on)."""
    pivot, source, partner = views(seed)
    matches = match_rows(pivot, source, partner)
    hit = matches.source_row >= 0
    s = matches.source_row[hit]
    assert (pivot.turn[hit] == source.turn[s]).all()
    assert (pivot.starts[hit] == source.starts[s]).all()
    assert (hit == (matches.kind != RowKind.NONE)).all()


def random_map(rng: random.Random, source: ByteTable, pivot: ByteTable, width: int) -> VocabMap:
    target = np.full((len(source), width), -1, np.int32)
    weight = np.zeros((len(source), width), np.float32)
    for i in range(len(source)):
        n = rng.choice([0, 1, min(width, len(pivot))])
        target[i, :n] = rng.sample(range(len(pivot)), n)
        weight[i, :n] = np.array([rng.uniform(0.1, 1) for _ in range(n)])
        weight[i] /= weight[i].sum() or 1
    quality = np.where(target[:, 0] < 0, 0, [rng.choice([1, 2]) for _ in range(len(source))])
    return VocabMap(target=target, weight=weight, quality=quality.astype(np.uint8))


def one_target(target: np.ndarray) -> VocabMap:
    shape = (1, len(target), 1)
    return VocabMap(
        target=target.astype(np.int32).reshape(shape),
        weight=np.ones(shape, np.float32),
        quality=np.ones(shape[:2], np.uint8),
    )


def slow_remap(
    matches: Matches, pivot: RowView, source: RowView, index: Any, maps: VocabMap, choices: Choices
) -> tuple[list[dict[int, float]], list[float], np.ndarray, np.ndarray]:
    """Every row as {pivot id: probability}, the gold's log-probability, and the mass counted."""
    rows, golds = [], []
    mass, lost = np.zeros((4, 3)), np.zeros(len(source.table))
    ids, logprobs = source.block["row.ids"], source.block["row.logprobs"].astype(np.float64)
    source_golds = source.block["row.gold_logprob"].astype(np.float64)
    for r, kind in enumerate(matches.kind.tolist()):
        gold = int(pivot.gold[r])
        if kind == RowKind.NONE:
            rows.append({gold: 1.0} if choices.unaligned == "gold" else {})
            golds.append(math.nan)
            continue
        s, n, rest = (int(x[r]) for x in (matches.source_row, matches.chain, matches.rest_bytes))
        row: dict[int, float] = {}
        chain = 0.0
        if kind == RowKind.FINER:
            tail = pivot.table.token(gold)[len(pivot.table.token(gold)) - rest :]
            chain = sum(source_golds[s : s + n - (rest > 0)])
            if rest:
                last = s + n - 1
                p = math.exp(source_golds[last])
                for token, logprob in zip(ids[last].tolist(), logprobs[last]):
                    if token != source.gold[last] and source.table.token(token).startswith(tail):
                        p += math.exp(logprob)
                chain += math.log(p)
            chain = min(chain, 0.0)
            if choices.granularity != "first":
                rows.append({gold: 1.0 if choices.granularity == "gold" else math.exp(chain)})
                golds.append(chain)
                continue
        on_gold = math.exp(source_golds[s])
        for token, logprob in zip(ids[s].tolist(), logprobs[s]):
            if logprob == -math.inf:
                continue
            p = math.exp(logprob)
            shares = [
                (int(to), p * float(w))
                for to, w in zip(maps.target[index[r], token], maps.weight[index[r], token])
                if to >= 0
            ]
            if maps.target.shape[2] == 1:
                shares = [(to, p) for to, _ in shares]
            how = int(maps.quality[index[r], token])
            is_gold = kind != RowKind.FINER and token == source.gold[s]
            if is_gold or (pivot.at_end[r] and source.table.role(token) in (Role.EOS, Role.TURN)):
                shares, how = [(gold, p)], 1
            if not shares:
                mass[kind, 0] += p
                lost[token] += p
                continue
            mass[kind, how] += p
            for to, share in shares:
                on_gold += share if to == gold and not is_gold else 0
                if to not in row or choices.collisions == "sum":
                    row[to] = row.get(to, 0.0) + share
        rows.append(row)
        golds.append(
            {RowKind.SAME: source_golds[s], RowKind.COARSER: min(math.log(on_gold), 0), RowKind.FINER: chain}[kind]
        )
    return rows, golds, mass, lost


CHOICES = [
    Choices(granularity=g, unaligned=u, collisions=c)
    for g, u, c in [("chain", "gold", "sum"), ("first", "skip", "first"), ("gold", "pivot", "sum")]
]


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**32), choices=st.sampled_from(CHOICES))
def test_remapping_is_the_sum_of_probabilities(seed: int, choices: Choices) -> None:
    """Catches lost or doubled mass, wrong gold rules, wrong chains, and any difference between the two engines."""
    rng = random.Random(seed)
    pivot, source, partner = views(seed, k=rng.choice([1, 4, 7]))
    width = rng.choice([1, 1, 3])
    maps = stack_maps([random_map(rng, source.table, pivot.table, rng.choice([1, width])) for _ in range(2)])
    results = []
    for choice in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSECHAT_NATIVE", choice)
            matches = match_rows(pivot, source, partner)
            index = np.array([rng.randrange(2) for _ in matches.kind], np.int16) if not results else index  # noqa: F821
            results.append(remap_rows(matches, pivot, source, index, maps, choices, 2))
    rows, golds, mass, lost = slow_remap(matches, pivot, source, index, maps, choices)
    for got in results:
        assert got.ids.dtype == np.uint16
        values = got.logprobs.astype(np.float64)
        assert (np.diff(np.where(np.isinf(values), -1e9, values), axis=1) <= 0).all() or choices.collisions == "first"
        for r, row in enumerate(rows):
            present = ~np.isinf(values[r])
            assert (
                len(set(got.ids[r][present].tolist()))
                == present.sum()
                == min(len(row), source.block["row.ids"].shape[1])
            )
            dropped = sorted(row.values(), reverse=True)[present.sum() :]
            assert (
                not dropped or math.log(dropped[0]) <= values[r][present].min() + 2e-3 or choices.collisions == "first"
            )
            assert not got.ids[r][~present].any()
            for token, logprob in zip(got.ids[r][present].tolist(), values[r][present]):
                assert logprob == pytest.approx(min(math.log(row[token]), 0), abs=2e-3, rel=2e-3)
        assert got.gold_logprob == pytest.approx(np.array(golds), abs=1e-4, nan_ok=True)
        assert got.mass / 2**30 == pytest.approx(mass, abs=1e-5)
        assert got.lost / 2**30 == pytest.approx(lost, abs=1e-5)
    same(results[0], results[1])


def same(a: Remapped, b: Remapped) -> None:
    """Both engines agree to the last bit of what is stored, but for one unit in the last place after a logarithm."""
    assert (a.mass == b.mass).all()
    assert (a.lost == b.lost).all()
    assert a.gold_logprob == pytest.approx(b.gold_logprob, abs=1e-6, nan_ok=True)
    difference = np.abs(a.logprobs.view(np.int16).astype(int) - b.logprobs.view(np.int16).astype(int))
    zero = (a.logprobs == 0) & (b.logprobs == 0)
    assert (difference[~zero] <= 1).all()


def test_stored_values_come_through_bit_for_bit(backend: str) -> None:
    """Catches a detour through exp and log for candidates that collide with nothing."""
    _, source, _ = views(5, k=4)
    n = len(source.gold)
    matches = Matches(
        kind=np.zeros(n, np.uint8),
        source_row=np.arange(n),
        chain=np.ones(n, np.int32),
        rest_bytes=np.zeros(n, np.int32),
    )
    twin = RowView.of(source.block, source.table)
    got = remap_rows(matches, twin, source, np.zeros(n, np.int16), one_target(np.arange(len(source.table))), CHOICES[0])
    assert (got.logprobs == source.block["row.logprobs"]).all()
    assert (got.ids == source.block["row.ids"]).all()
    assert (got.gold_logprob == source.block["row.gold_logprob"]).all()


def test_subnormal_and_tiny_sums_round_to_the_nearest_half(backend: str) -> None:
    """Catches a half-precision conversion that truncates, or fails below 2^-14."""
    table = ByteTable.from_tokens([b"a", b"b"])
    logs = np.array([[math.log(p), math.log(1 - p - d)] for p in (0.5, 0.8, 1e-4) for d in (0, 1e-7, 1e-5, 3e-4, 0.1)])
    record = {
        "dialogue.index": np.array([0]),
        "token.input_ids": np.zeros(len(logs) + 1, np.int32),
        "token.loss_mask": np.ones(len(logs) + 1, bool),
        "token.turn": np.zeros(len(logs) + 1, np.int32),
        "token.byte_end": np.arange(1, len(logs) + 2, dtype=np.int32),
        "row.ids": np.tile(np.array([[0, 1]], np.uint16), (len(logs), 1)),
        "row.logprobs": logs.astype(np.float16),
        "row.gold_logprob": logs[:, 0].astype(np.float32),
    }
    view = RowView.of(make_block([record]), table)
    matches = match_rows(view, view, np.array([0]))
    got = remap_rows(matches, view, view, np.zeros(len(logs), np.int16), one_target(np.zeros(2)), CHOICES[0])
    total = np.exp(logs.astype(np.float16).astype(np.float64)).sum(axis=1)
    want = np.minimum(np.log(total), 0).astype(np.float32).astype(np.float16)
    assert np.abs(got.logprobs[:, 0].astype(float) - want.astype(float)).max() <= 2.0**-24
    assert np.isneginf(got.logprobs[:, 1]).all()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"row.ids": 60_000}, "source token 60000"),
        ({"row.logprobs": np.nan}, "NaN or positive|is NaN"),
        ({"row.logprobs": 0.5}, "positive"),
    ],
)
def test_hostile_rows_are_refused(backend: str, damage: dict[str, Any], named: str) -> None:
    """Catches reads outside a map and NaN taken for a probability."""
    pivot, source, partner = views(3)
    matches = match_rows(pivot, source, partner)
    assert (matches.kind == RowKind.SAME).any()
    columns = dict(source.block.columns)
    for key, value in damage.items():
        columns[key] = columns[key].astype(np.uint16) if key == "row.ids" else columns[key].copy()
        columns[key][:, 0] = value
    hostile = RowView.of(Block(columns=columns, offsets=source.block.offsets), source.table)
    maps, index = one_target(np.zeros(len(source.table))), np.zeros(len(matches.kind), np.int16)
    outside = one_target(np.full(len(source.table), 9999))
    with pytest.raises(ValueError, match=named):
        remap_rows(matches, pivot, hostile, index, maps, CHOICES[1])
    with pytest.raises(ValueError, match="map entry"):
        remap_rows(matches, pivot, source, index, outside, CHOICES[0])
    with pytest.raises(ValueError, match="map 7"):
        remap_rows(matches, pivot, source, index + 7, maps, CHOICES[0])


def test_offsets_that_lie_are_refused(backend: str) -> None:
    """Catches row offsets that are not the loss mask's, which would write over other dialogues' rows."""
    pivot, source, partner = views(3)
    wrong = dict(pivot.block.offsets)
    wrong["row"] = np.concatenate([wrong["row"][:-1], wrong["row"][-1:] - 1])
    lying = RowView.of(Block(columns=pivot.block.columns, offsets=wrong), pivot.table)
    with pytest.raises(ValueError, match="loss mask"):
        match_rows(lying, source, partner)


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    """Catches a store read with another model's tokenizer."""
    pivot, _, _ = views(3)
    with pytest.raises(FormatError, match="outside its vocabulary of 1"):
        RowView.of(pivot.block, ByteTable.from_tokens([b"a"]))


@pytest.mark.parametrize("pair", [("openchat-3.5-exact", "gpt2"), ("openchat-3.5", "openchat-3.5-exact")])
def test_real_tokenizers_match_where_their_bytes_do(shared_data: Path, pair: tuple[str, str]) -> None:
    """Catches a match between two real tokenizations whose texts so far differ, and a match that is missed."""
    from transformers import AutoTokenizer

    chapters = [shared_data / "text" / "parallel_hf_course" / lang / "chapter1" / "3.mdx" for lang in ("en", "zh-CN")]
    text = "\n".join(path.read_text(encoding="utf-8")[:3000] for path in chapters if path.exists())
    sides = []
    for name in pair:
        tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
        table = ByteTable.from_tokenizer(tokenizer)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ends = token_byte_ends(table, ids, text.encode())
        n = len(ids)
        record = {
            "dialogue.index": np.array([0]),
            "token.input_ids": np.array(ids, np.int32),
            "token.loss_mask": np.ones(n, bool),
            "token.turn": np.zeros(n, np.int32),
            "token.byte_end": ends.astype(np.int32),
            "row.ids": np.zeros((n - 1, 1), np.int32),
        }
        sides.append((RowView.of(make_block([record]), table), ends))
    (pivot, pivot_ends), (source, source_ends) = sides
    kinds = match_rows(pivot, source, np.array([0])).kind
    assert ((kinds != RowKind.NONE) == np.isin(pivot_ends[:-1], source_ends[:-1])).all()
    assert 0.5 < (kinds != RowKind.NONE).mean() < 1
