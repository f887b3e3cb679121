"""Dynamic time warping and edit distance: both engines against the definition written plainly."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusechat.align import dtw
from fusechat.align.backend import engine
from fusechat.bench.align_baselines import plain_edit_distance

pytestmark = pytest.mark.usefixtures("backend")

# The backend is the same for all examples of one test.
FIXTURE_IS_CONSTANT = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def cost(source: str, pivot: str, source_mark: str, pivot_mark: str) -> int:
    a, b = source.replace(source_mark, ""), pivot.replace(pivot_mark, "")
    if not a or not b:
        return plain_edit_distance(source.replace(source_mark, pivot_mark), pivot)
    return plain_edit_distance(a, b)


def slow_dtw(source: list[str], pivot: list[str], marks: tuple[str, str]) -> tuple[int, list[list[int]]]:
    n, m = len(source), len(pivot)
    total: dict[tuple[int, int], float] = {}

    def at(i: int, j: int) -> float:
        return total.get((i, j), float("inf"))

    for i in range(n):
        for j in range(m):
            before = 0 if i == j == 0 else min(at(i - 1, j), at(i, j - 1), at(i - 1, j - 1))
            total[i, j] = cost(source[i], pivot[j], *marks) + before
    i, j = n - 1, m - 1
    path = [[i, j]]
    while (i, j) != (0, 0):
        # The first minimum of diagonal, left, up.
        i, j = min([(i - 1, j - 1), (i, j - 1), (i - 1, j)], key=lambda cell: at(*cell))
        path.append([i, j])
    return int(total[n - 1, m - 1]), path[::-1]


ALPHABETS = ["a", "ab", "ab▁Ġ", "▁Ġ", "abcdefgh ▁", "ab🦙你好\ufffd\udce9Ġ"]


def tokens(rng: random.Random, longest: int) -> list[str]:
    alphabet = rng.choice(ALPHABETS)
    count = rng.choice([1, 2, 3, 15, 16, 17, 33, 40])
    return ["".join(rng.choices(alphabet, k=rng.randint(0, longest))) for _ in range(count)]


@settings(FIXTURE_IS_CONSTANT, max_examples=120)
@given(seed=st.integers(0, 2**32))
def test_cost_and_path_are_the_definitions(backend: str, seed: int) -> None:
    """Catches wrong ties, marks, empty strings, lanes that leak into each other, and strips that do not fit."""
    rng = random.Random(seed)
    longest = rng.choice([1, 2, 4, 9, 33])
    source, pivot = tokens(rng, longest), tokens(rng, longest)
    marks = rng.choice([("Ġ", "▁"), ("▁", "▁"), ("ab", "a")])
    got = dtw(source, pivot, source_mark=marks[0], pivot_mark=marks[1])
    want_cost, want_path = slow_dtw(source, pivot, marks)
    assert got.cost == want_cost
    assert got.path.dtype == np.int32
    assert got.path.tolist() == want_path
    lists: list[list[int]] = [[] for _ in pivot]
    for s, p in want_path:
        lists[p].append(s)
    assert got.pivot_to_source == lists


WORDS = (6, 7, 8, 14, 15, 16, 30, 31, 32, 62, 63, 64, 254)  # and one more: around every width of a machine word


@pytest.mark.parametrize(
    ("source", "pivot"),
    [
        (["a"] * 70, ["a"] * 70),
        ([chr(97 + i) for i in range(20)], [chr(65 + i) for i in range(20)]),
        (["x" * 10_000, "y"], ["x", "y" * 3]),
        (["a"], ["b"] * 50),
        (["b"] * 50, ["a"]),
        (["a" * n for n in (31, 32, 33, 63, 64, 65, 255, 256)], ["a" * n for n in (32, 64, 65, 254, 257)]),
        (["", "", ""], ["", ""]),
        (["a" * n + "b" for n in WORDS], ["b" + "ab" * (n // 2) for n in WORDS]),
        (["a" * 250, "b" * 240, "ab" * 120] * 60, ["b" * 250, "c" * 230] * 60),
    ],
    ids=["equal", "different", "long", "one-source", "one-pivot", "word-sizes", "empty", "narrow-words", "wide-sums"],
)
def test_adversarial_sequences(source: list[str], pivot: list[str]) -> None:
    """Catches overflowing costs, patterns around the machine word, and a side with a single token."""
    got = dtw(source, pivot, source_mark="Ġ", pivot_mark="▁")
    want_cost, want_path = slow_dtw(source, pivot, ("Ġ", "▁"))
    assert (got.cost, got.path.tolist()) == (want_cost, want_path)


def test_an_empty_side_is_refused() -> None:
    """Catches a path through nothing."""
    for sides in ([], ["a"]), (["a"], []):
        with pytest.raises(ValueError, match="need a token"):
            dtw(*sides, source_mark="Ġ", pivot_mark="▁")


TEXT = st.text(alphabet="ab▁é🦙", max_size=70)


@settings(FIXTURE_IS_CONSTANT, max_examples=150)
@given(patterns=st.lists(TEXT, min_size=1, max_size=20), texts=st.lists(TEXT, min_size=1, max_size=20))
def test_nearest_is_the_first_of_the_least_distance(backend: str, patterns: list[str], texts: list[str]) -> None:
    """Catches pruning that skips the nearest, ties resolved by length order, and blocks that mix fast and slow."""
    index, distance = engine().nearest(patterns, texts, 2)
    for i, pattern in enumerate(patterns):
        distances = [plain_edit_distance(pattern, text) for text in texts]
        assert distance[i] == min(distances)
        assert index[i] == distances.index(min(distances))


@settings(FIXTURE_IS_CONSTANT, max_examples=150)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), max_size=10))
def test_edit_distance(backend: str, pairs: list[tuple[str, str]]) -> None:
    """Catches carries lost between the words of long patterns."""
    got = engine().edit_distances([a for a, _ in pairs], [b for _, b in pairs])
    assert got.tolist() == [plain_edit_distance(a, b) for a, b in pairs]
    a, b = "ab" * 200, "ba" * 130
    assert engine().edit_distances([a], [b]).tolist() == [plain_edit_distance(a, b)]
