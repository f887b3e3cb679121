"""Intervals and tests of ratios of sums, against enumeration and definitions written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusechat.evaluate.bootstrap import Ratio, compare, comparison_table, holm, swap_test


def _ratio(top: list[float] | np.ndarray, bottom: list[float] | np.ndarray) -> Ratio:
    return Ratio(numerator=np.asarray(top, float), denominator=np.asarray(bottom, float))


def test_values_are_ratios_of_sums_and_not_a_mean_of_ratios() -> None:
    one = compare({"a": _ratio([8, 1], [1, 7])}, against="a", samples=100)["a"]
    assert one.level.value == pytest.approx(9 / 8)
    assert (one.difference.value, one.difference.low, one.difference.high, one.p) == (0, 0, 0, 1)


def test_intervals_are_those_of_resampled_totals() -> None:
    """Catches a bootstrap of the mean of ratios: one long dialogue weighs what its bytes weigh."""
    bits, size = np.array([900.0] + [1.0] * 30), np.array([1000.0] + [10.0] * 30)
    level = compare({"a": _ratio(bits, size)}, against="a", samples=4000, seed=2)["a"].level
    rng = np.random.default_rng(7)
    totals = []
    for _ in range(4000):
        pick = rng.integers(0, 31, 31)
        totals.append(bits[pick].sum() / size[pick].sum())
    assert level.low == pytest.approx(np.quantile(totals, 0.025), abs=0.02)
    assert level.high == pytest.approx(np.quantile(totals, 0.975), abs=0.02)


def test_paired_intervals_see_a_difference_that_unpaired_ones_hide() -> None:
    rng = np.random.default_rng(3)
    size = rng.integers(20, 200, 60).astype(float)
    base = size * 2.0 * rng.uniform(0.8, 1.2, 60)
    done = compare({"base": _ratio(base, size), "better": _ratio(base * 0.99, size)}, against="base", seed=1)
    assert done["better"].difference.high < 0
    assert done["better"].p < 0.001
    assert done["better"].level.high > done["base"].level.low  # the intervals themselves overlap


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        size = rng.integers(50, 150, 80).astype(float)
        level = compare({"a": _ratio(size * rng.normal(1.5, 0.3, 80), size)}, against="a", samples=300, seed=trial)
        hits += level["a"].level.low <= 1.5 <= level["a"].level.high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_ratio_over_nothing_is_nan_and_no_error() -> None:
    done = compare({"a": _ratio([1, 1], [1, 1]), "b": _ratio([0, 0], [0, 0])}, against="a", samples=50)
    assert np.isnan([done["b"].level.value, done["b"].difference.low, done["b"].p]).all()


@given(seed=st.integers(0, 1000), n=st.integers(2, 8))
def test_the_swap_test_approaches_the_enumeration_of_all_swaps(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a = _ratio(rng.normal(1.0, 1.0, n), rng.uniform(1, 5, n))
    b = _ratio(rng.normal(1.4, 1.0, n), rng.uniform(1, 5, n))
    observed = abs(a.numerator.sum() / a.denominator.sum() - b.numerator.sum() / b.denominator.sum())
    as_large = 0
    for swap in itertools.product([False, True], repeat=n):
        top_a, top_b = np.where(swap, b.numerator, a.numerator), np.where(swap, a.numerator, b.numerator)
        low_a, low_b = np.where(swap, b.denominator, a.denominator), np.where(swap, a.denominator, b.denominator)
        as_large += abs(top_a.sum() / low_a.sum() - top_b.sum() / low_b.sum()) >= observed - 1e-12
    assert swap_test(a, b, permutations=20_000, seed=seed) == pytest.approx(as_large / 2**n, abs=0.02)


def test_p_values_are_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    size = np.full(30, 10.0)
    p = [
        swap_test(_ratio(rng.normal(0, 1, 30), size), _ratio(rng.normal(0, 1, 30), size), permutations=200, seed=t)
        for t in range(400)
    ]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(p) == pytest.approx(0.5, abs=0.05)


def test_equal_models_have_p_one() -> None:
    same = _ratio([1.0, 2.0, 3.0], [1, 1, 1])
    assert swap_test(same, same) == 1.0


def _slow_holm(p: list[float]) -> list[float]:
    out = []
    for value in p:
        smaller = [q for q in p if q <= value]
        out.append(min(1.0, max(q * sum(r >= q for r in p) for q in smaller)))
    return out


@given(st.lists(st.floats(0, 1), max_size=12, unique=True))
def test_holm_equals_its_definition(p: list[float]) -> None:
    assert holm(p) == pytest.approx(_slow_holm(p))


def test_holm_leaves_out_what_has_no_value() -> None:
    adjusted = holm([0.01, float("nan"), 0.04])
    assert adjusted[0] == pytest.approx(0.02)
    assert np.isnan(adjusted[1])
    assert adjusted[2] == pytest.approx(0.04)


def test_the_overall_comparison_is_adjusted_over_models_only() -> None:
    rng = np.random.default_rng(1)
    size = np.full(40, 10.0)
    base = rng.normal(20, 3, 40)
    ratios = {name: _ratio(base + shift, size) for name, shift in (("sft", 0), ("a", -1), ("b", -2), ("c", 0.0))}
    members = {"overall": np.arange(40), "x": np.arange(20), "y": np.arange(20, 40)}
    groups = {group: {name: ratio.of(m) for name, ratio in ratios.items()} for group, m in members.items()}
    table = comparison_table(groups, value_name="v", against="sft", samples=50, confidence=0.95, seed=0)
    least = 1 / 10_001
    assert table["overall"]["a"]["p_holm"] == pytest.approx(3 * least, rel=0.7)
    assert table["x"]["a"]["p_holm"] == pytest.approx(6 * table["x"]["a"]["p"], rel=0.7)
    assert table["overall"]["c"]["p_holm"] == 1
    assert table["overall"]["sft"]["p_holm"] is None
