"""Bits per byte by dialogue and category against definitions written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError, DataError
from fusechat.evaluate.bpb import Scores, common_dialogues, paired_differences, results_table, score_dialogues
from fusechat.records import Dialogue


def _scores(rng: np.random.Generator, n: int, level: float) -> Scores:
    sizes = rng.integers(20, 200, n)
    return Scores(nll=sizes * level * np.log(2) * rng.uniform(0.8, 1.2, n), content_bytes=sizes)


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
    assert table["groups"]["overall"]["models"]["sft"]["p_holm"] is None
    assert 0 < table["groups"]["overall"]["models"]["merged"]["p_holm"] <= 1


def test_a_category_named_as_the_whole_is_refused() -> None:
    scores = {"a": _scores(np.random.default_rng(0), 2, 1.0)}
    with pytest.raises(DataError, match="'overall'"):
        results_table(
            scores, [Dialogue(messages=(), category="overall")] * 2, against="a", samples=9, confidence=0.95, seed=0
        )


def test_differences_of_one_model_to_others_are_those_of_resampled_dialogues() -> None:
    """Catches a sign turned in the value and not in the bounds, and dialogues that one model lacks."""
    rng = np.random.default_rng(4)
    size = rng.integers(20, 200, 40)
    nll = {name: size * rng.normal(level, 0.1, 40) for name, level in (("merged", 1.0), ("a", 1.1), ("b", 1.0))}
    nll["b"][7] = np.nan
    scores = {name: Scores(nll=values, content_bytes=size) for name, values in nll.items()}
    found = paired_differences(scores, of="merged", to=["a", "b"], samples=4000, confidence=0.9, seed=0)
    known = np.flatnonzero(np.arange(40) != 7)
    for name in ("a", "b"):
        gap = (nll["merged"] - nll[name]) / np.log(2)
        value, low, high = found[name]["difference"]
        assert value == pytest.approx(gap[known].sum() / size[known].sum())
        picks = rng.choice(known, (4000, len(known)))
        resampled = gap[picks].sum(1) / size[picks].sum(1)
        assert [low, high] == pytest.approx(np.quantile(resampled, [0.05, 0.95]), abs=0.005)
        assert found[name]["p_holm"] >= found[name]["p"]
    assert found["a"]["difference"][2] < 0
    assert found["a"]["p_holm"] == pytest.approx(2 * found["a"]["p"])


@pytest.mark.parametrize("dtype", ["fp16", "nn"])
def test_an_unknown_dtype_is_one_line(dtype: str, tiny_world: Any) -> None:
    """Catches a traceback from torch, which has other things of such names, too: the option takes any word."""
    dialogues = load_dialogues(tiny_world.dialogues)
    with pytest.raises(ConfigError, match=f"dtype '{dtype}' is not known"):
        score_dialogues(str(tiny_world.pivot), dialogues, dtype=dtype)
