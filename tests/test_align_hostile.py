"""Hostile input to the engine: it may be refused, and must never crash or reach outside its arrays."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

native = pytest.importorskip("fusechat._native", reason="the compiled engine is not built")

EXTREMES = [-(2**31), -2, -1, 0, 1, 2, 3, 7, 2**31 - 1]


def numbers(rng: random.Random, n: int, dtype: Any, likely: int) -> np.ndarray:
    info = np.iinfo(dtype)
    values = [rng.choice(EXTREMES) if rng.random() < 0.1 else rng.randrange(likely) for _ in range(n)]
    return np.clip(values, info.min, info.max).astype(dtype)


def offsets(rng: random.Random, n: int, total: int) -> np.ndarray:
    good = np.sort([0, *(rng.randint(0, total) for _ in range(n - 1)), total])
    return good.astype(np.int64) if rng.random() < 0.8 else numbers(rng, n + 1, np.int64, total + 1)


def tokens(rng: random.Random) -> tuple[np.ndarray, ...]:
    n, total = rng.randint(1, 3), rng.randint(0, 12)
    mask = np.array([rng.random() < 0.8 for _ in range(total)], np.bool_)
    at = offsets(rng, n, total)
    rows = at.copy()
    if (np.diff(at) >= 0).all() and at[0] == 0 and at[-1] == total:
        rows = np.cumsum([0, *(int(mask[a + 1 : b].sum()) for a, b in itertools.pairwise(at))]).astype(np.int64)
    if rng.random() < 0.1:
        rows = offsets(rng, n, total)
    columns = [numbers(rng, total, np.int32, 3), numbers(rng, total, np.int32, 12), numbers(rng, total, np.uint8, 2)]
    if rng.random() < 0.05:
        columns[rng.randrange(3)] = numbers(rng, total + 1, np.int32, 3)
    return (at, rows, mask, *columns)


@settings(deadline=None, max_examples=1500)
@given(seed=st.integers(0, 2**48))
def test_matching_survives_anything(seed: int) -> None:
    """Catches reads and writes beyond columns whose offsets, turns or ends lie."""
    rng = random.Random(seed)
    pivot, source = tokens(rng), tokens(rng)
    partner = numbers(rng, len(pivot[0]) - 1, np.int64, max(len(source[0]) - 1, 1))
    try:
        kind, source_row, chain, rest = native.match_rows(pivot, source, partner, rng.choice([-1, 1, 3]))
    except (ValueError, TypeError):
        return
    assert len(kind) == pivot[1][-1]
    found = source_row >= 0
    assert (source_row[found] + chain[found] <= source[1][-1]).all()
    assert (kind <= 3).all()
    assert len(rest) == len(chain)


@settings(deadline=None, max_examples=1500)
@given(seed=st.integers(0, 2**48))
def test_remapping_survives_anything(seed: int) -> None:
    """Catches source rows, chains, ids, map entries and byte tables out of range."""
    rng = random.Random(seed)
    rows, source_rows, k = rng.randint(0, 6), rng.randint(0, 5), rng.randint(0, 4)
    pivot_vocab, source_vocab, n_maps, width = (rng.randint(1, 5) for _ in range(4))

    def table(vocab: int) -> tuple[np.ndarray, np.ndarray]:
        data = numbers(rng, 6, np.uint8, 255)
        return data, offsets(rng, vocab, len(data))

    matched = (
        numbers(rng, rows, np.uint8, 4),
        numbers(rng, rows, np.int64, max(source_rows, 1)),
        numbers(rng, rows, np.int32, 3),
        numbers(rng, rows, np.int32, 3),
        numbers(rng, rows, np.int32, pivot_vocab),
        numbers(rng, rows, np.uint8, 2),
        numbers(rng, rows, np.int16, n_maps),
    )
    with np.errstate(all="ignore"):
        logprobs = -(np.abs(numbers(rng, source_rows * k, np.int32, 20)).astype(np.float32) / 4).astype(np.float16)
    halves = np.ascontiguousarray(logprobs.reshape(source_rows, k)).view(np.uint16)
    if rng.random() < 0.1:
        halves = numbers(rng, source_rows * k, np.uint16, 65536).reshape(source_rows, k)
    target = numbers(rng, n_maps * source_vocab * width, np.int32, pivot_vocab).reshape(n_maps, source_vocab, width)
    id_dtype, out_dtype = (rng.choice([np.uint16, np.int32]) for _ in range(2))
    arguments: list[Any] = [
        matched,
        numbers(rng, source_rows * k, id_dtype, source_vocab).reshape(source_rows, k),
        halves,
        np.zeros(source_rows, np.float32),
        numbers(rng, source_rows, np.int32, source_vocab),
        table(source_vocab),
        numbers(rng, source_vocab, np.uint8, 2),
        table(pivot_vocab),
        target,
        np.ones(target.shape, np.float32),
        numbers(rng, n_maps * source_vocab, np.uint8, 3).reshape(n_maps, source_vocab),
        np.ones(32768, np.float32),
        tuple(rng.choice([0, 1, 2, 0, 1, 9]) for _ in range(3)),
        np.empty(0, out_dtype),
        rng.choice([-1, 1, 2]),
    ]
    if rng.random() < 0.1:
        spoilt = rng.choice([1, 2, 3, 4, 6, 8, 9, 10, 11])
        arguments[spoilt] = arguments[spoilt][:-1] if len(arguments[spoilt]) else arguments[spoilt].reshape(-1)
    try:
        ids, out, *_ = native.remap_rows(*arguments)
    except (ValueError, TypeError):
        return
    assert ids.shape == out.shape == (rows, k)
    assert (ids < pivot_vocab).all()


@settings(deadline=None, max_examples=300)
@given(
    source=st.lists(st.text(max_size=70), max_size=20),
    pivot=st.lists(st.text(max_size=70), max_size=20),
    marks=st.tuples(st.text(max_size=2), st.text(max_size=2)),
)
def test_warping_survives_any_text(source: list[str], pivot: list[str], marks: tuple[str, str]) -> None:
    """Catches marks that are empty or long, lone surrogates, and planes beyond the first."""
    if not source or not pivot:
        with pytest.raises(ValueError, match="need a token"):
            native.dtw(source, pivot, *marks)
        return
    cost, path = native.dtw([*source, "\ud800"], pivot, *marks)
    assert cost >= 0
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [len(source), len(pivot) - 1]


@settings(deadline=None, max_examples=300)
@given(
    patterns=st.lists(st.text(max_size=70), max_size=20),
    texts=st.lists(st.text(max_size=70), max_size=20),
    threads=st.sampled_from([-1, 0, 1, 3]),
)
def test_distances_survive_any_text(patterns: list[str], texts: list[str], threads: int) -> None:
    """Catches sides without strings, empty strings, lone surrogates, and lists of different lengths."""
    patterns = [*patterns, "\ud800"]
    index, distance = native.nearest(patterns, texts, threads)
    assert ((index >= 0) & (index < len(texts)) if texts else index == -1).all()
    if len(patterns) != len(texts):
        with pytest.raises(ValueError, match="equally long"):
            native.edit_distances(patterns, texts)
    n = min(len(patterns), len(texts))
    found = native.edit_distances(patterns[:n], texts[:n])
    assert (found <= [max(len(a), len(b)) for a, b in zip(patterns[:n], texts[:n])]).all()
    assert all(distance[i] <= found[i] for i in range(n))


@pytest.mark.parametrize("wrong", [[1], [b"a"], [None]])
def test_tokens_that_are_no_strings_are_refused(wrong: list[Any]) -> None:
    """Catches a read of another object's memory as text."""
    for call in (
        lambda: native.dtw(wrong, ["a"], "", ""),
        lambda: native.nearest(["a"], wrong, 1),
        lambda: native.edit_distances(wrong, ["a"]),
    ):
        with pytest.raises(TypeError):
            call()
