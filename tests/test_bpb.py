"""Bits per byte and their intervals against definitions written out."""

from __future__ import annotations

import numpy as np
import pytest

from fusechat.errors import DataError
from fusechat.evaluate.bpb import Scores, bits_per_byte, common_dialogues, results_table
from fusechat.records import Dialogue


def _scores(rng: np.random.Generator, n: int, level: float) -> Scores:
    sizes = rng.integers(20, 200, n)
    return Scores(nll=sizes * level * np.log(2) * rng.uniform(0.8, 1.2, n), content_bytes=sizes)


def test_values_are_total_bits_over_total_bytes_and_not_a_mean_of_ratios() -> None:
    scores = {"a": Scores(nll=np.log(2) * np.array([8.0, 1.0]), content_bytes=np.array([1, 7]))}
    levels, gains = bits_per_byte(scores, np.arange(2), against="a", samples=100)
    assert levels["a"].value == pytest.approx(9 / 8)
    assert (gains["a"].value, gains["a"].low, gains["a"].high) == (0, 0, 0)


def test_intervals_are_those_of_resampled_totals() -> None:
    """Catches a bootstrap of the mean of ratios: one long dialogue weighs what its bytes weigh."""
    bits, size = np.array([900.0] + [1.0] * 30), np.array([1000] + [10] * 30)
    scores = {"a": Scores(nll=np.log(2) * bits, content_bytes=size)}
    levels, _ = bits_per_byte(scores, np.arange(31), against="a", samples=4000, seed=2)
    rng = np.random.default_rng(7)
    totals = []
    for _ in range(4000):
        pick = rng.integers(0, 31, 31)
        totals.append(bits[pick].sum() / size[pick].sum())
    assert levels["a"].low == pytest.approx(np.quantile(totals, 0.025), abs=0.02)
    assert levels["a"].high == pytest.approx(np.quantile(totals, 0.975), abs=0.02)


def test_paired_intervals_see_a_difference_that_unpaired_ones_hide() -> None:
    rng = np.random.default_rng(3)
    base = _scores(rng, 60, 2.0)
    better = Scores(nll=base.nll * 0.99, content_bytes=base.content_bytes)
    levels, gains = bits_per_byte({"base": base, "better": better}, np.arange(60), against="base", seed=1)
    assert gains["better"].excludes_zero
    assert gains["better"].value < 0
    assert levels["better"].high > levels["base"].low  # the intervals themselves overlap


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        sizes = rng.integers(50, 150, 80)
        scores = {"a": Scores(nll=sizes * np.log(2) * rng.normal(1.5, 0.3, 80), content_bytes=sizes)}
        levels, _ = bits_per_byte(scores, np.arange(80), against="a", samples=300, seed=trial)
        hits += levels["a"].low <= 1.5 <= levels["a"].high
    assert 0.88 <= hits / 200 <= 0.99


def test_only_dialogues_every_model_was_scored_on_are_compared() -> None:
    a = Scores(nll=np.array([1.0, np.nan, 2.0]), content_bytes=np.array([5, 5, 0]))
    b = Scores(nll=np.array([1.0, 1.0, 2.0]), content_bytes=np.array([5, 5, 0]))
    assert common_dialogues({"a": a, "b": b}).tolist() == [0]
    empty = Scores(nll=np.array([np.nan]), content_bytes=np.array([5]))
    with pytest.raises(DataError, match="fits the context of every model"):
        common_dialogues({"a": empty})


def test_the_table_splits_by_category() -> None:
    rng = np.random.default_rng(0)
    dialogues = [Dialogue(messages=(), category=c) for c in "xxyyy"]
    scores = {"sft": _scores(rng, 5, 2.0), "merged": _scores(rng, 5, 1.0)}
    table = results_table(scores, dialogues, against="sft", samples=100, confidence=0.95, seed=0)
    assert [(name, group["n_dialogues"]) for name, group in table["groups"].items()] == [
        ("overall", 5),
        ("x", 2),
        ("y", 3),
    ]
    merged = table["groups"]["y"]["models"]["merged"]
    nll, size = scores["merged"].nll[2:].sum(), scores["merged"].content_bytes[2:].sum()
    assert merged["bits_per_byte"][0] == pytest.approx(nll / np.log(2) / size)
    assert merged["difference_to_sft"][2] < 0
