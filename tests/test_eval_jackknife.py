"""The jackknife against what is known in closed form, and how often its intervals hold the truth.

Student's t is scipy's, which comes with alpaca_eval: what needs it is marked peer.
"""

from __future__ import annotations

import numpy as np
import pytest

from fusechat.evaluate.jackknife import N_GROUPS, Refitted, jackknife_table, without_groups


def _refitted(values: np.ndarray, seed: int = 0) -> Refitted:
    without = without_groups(lambda units: float(values[units].mean()), len(values), seed=seed)
    return Refitted(whole=float(values.mean()), without=without)


def test_every_unit_is_left_out_once_and_the_groups_are_the_same_for_every_figure() -> None:
    def kept_in_turn() -> list[set[int]]:
        kept: list[set[int]] = []

        def figure(units: np.ndarray) -> float:
            kept.append(set(units.tolist()))
            return 0.0

        without_groups(figure, 53, seed=1)
        return kept

    left_out = [set(range(53)) - units for units in kept_in_turn()]
    assert sorted(unit for group in left_out for unit in group) == list(range(53))
    assert {len(group) for group in left_out} == {2, 3}
    assert kept_in_turn() == kept_in_turn()


@pytest.mark.peer
def test_of_a_mean_with_one_unit_a_group_it_is_the_standard_error_of_the_mean() -> None:
    stats = pytest.importorskip("scipy.stats")

    values = np.random.default_rng(0).normal(3, 2, N_GROUPS)
    found = _refitted(values)
    low, high = stats.t.interval(0.9, N_GROUPS - 1, loc=values.mean(), scale=stats.sem(values))
    assert found.interval(0.9).triple() == pytest.approx([values.mean(), low, high])
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


@pytest.mark.peer
def test_its_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(400):
        interval = _refitted(rng.exponential(2.0, 200), seed=trial).interval(0.95)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.91 <= hits / 400 <= 0.98


@pytest.mark.peer
def test_differences_are_paired_and_adjusted_for_their_number() -> None:
    pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    base = rng.normal(50, 10, 300)
    figures = {"a": _refitted(base), "b": _refitted(base + rng.normal(0.5, 1, 300)), "c": _refitted(base)}
    table = jackknife_table(figures, value_name="rate", against="a", confidence=0.95)
    value, low, high = table["b"]["difference_to_a"]
    assert low > 0, "each level's interval is ±1.2: only the pairing shows half a point"
    assert high - low < 0.6
    assert table["a"]["rate"][2] - table["a"]["rate"][1] > 1.5
    assert value == pytest.approx(figures["b"].whole - figures["a"].whole)
    assert table["c"]["difference_to_a"] == [0, 0, 0]
    assert (table["c"]["p"], table["a"]["p"], table["a"]["p_holm"]) == (1.0, None, None)
    assert table["b"]["p_holm"] == pytest.approx(2 * table["b"]["p"])
