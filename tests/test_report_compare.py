"""Runs side by side: what differs, and the merged models paired dialogue by dialogue."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusechat.errors import ConfigError, FormatError
from fusechat.report.compare import compare, compare_page, unique_names


def test_runs_stand_side_by_side_with_what_differs(reported_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "run"
    shutil.copytree(reported_run, other)
    settings = (other / "config.yaml").read_text().replace("select_topk: 0.5", "select_topk: 1.0")
    (other / "config.yaml").write_text(settings)
    third = tmp_path / "begun"
    third.mkdir()
    shutil.copy(reported_run / "config.yaml", third)
    compared = compare([reported_run, other, third])
    assert len(compared["runs"]) == 3
    assert compared["settings"] == {"merge.select_topk": dict(zip(compared["runs"], (0.5, 1.0, 0.5), strict=True))}
    assert compared["warnings"] == []
    assert "not evaluated yet" in list(compared["runs"].values())[2]["missing"]
    page = compare_page(compared)
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', re.sub(r"<script.*?</script>", "", page, flags=re.S))
    assert "merge.select_topk" in page
    with pytest.raises(ConfigError, match="twice"):
        compare([other, other])
    with pytest.raises(ConfigError, match="two runs"):
        compare([other])


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert unique_names([Path("/a/b/run"), Path("/a/c/run")]) == ["b/run", "c/run"]
    assert unique_names([Path("/a/b"), Path("/a/c")]) == ["b", "c"]


def test_runs_scored_on_the_same_dialogues_are_paired(reported_run: Path, tmp_path: Path) -> None:
    """Catches differences taken between tables instead of dialogue by dialogue, and pairs of different dialogues."""
    first, other, same = (shutil.copytree(reported_run, tmp_path / name) for name in ("run", "other", "same"))
    rng = np.random.default_rng(0)
    size = rng.integers(20, 90, 24)
    nll = size * rng.normal(1.0, 0.2, 24)
    kept = {
        "format": "fusechat.scores", "version": 1, "held_out_fingerprint": "one", "categories": ["a", "b"] * 12,
        "content_bytes": size.tolist(), "nll": {"merged": nll.tolist()},
    }  # fmt: skip
    for run in (first, same):
        (run / "scores.json").write_text(json.dumps(kept))
    kept["nll"] = {"merged": (1.1 * nll).tolist()}
    (other / "scores.json").write_text(json.dumps(kept))
    compared = compare([other, first, same])
    paired = compared["paired"]
    assert paired["against"] == "run"
    bits = nll.sum() / math.log(2) / size.sum()
    overall = paired["groups"]["overall"]
    value, low, high = overall["other"]["difference"]
    assert value == pytest.approx(0.1 * bits)
    assert 0.08 * bits < low < value < high < 0.12 * bits, "levels vary by a fifth: only the pairing is this sure"
    assert overall["other"]["verdict"] == "worse"
    assert overall["same"]["difference"] == [0, 0, 0]
    assert set(paired["groups"]) == {"overall", "a", "b"}
    assert compared["headline"] == "run leads, and same cannot be told from it"
    assert [line.split(":")[0] for line in compared["conclusions"][1:]] == [
        "other is behind", "same cannot be told from it",
    ]  # fmt: skip
    assert compared["conclusions"][0].startswith(f"run is at {bits:.3f} bits per byte, over 24 held-out dialogues")
    page = compare_page(compared)
    assert 'data-chart="paired"' in page
    assert "against run" in page
    kept["held_out_fingerprint"] = "other"
    (other / "scores.json").write_text(json.dumps(kept))
    assert compare([other, first])["paired"] is None
    (other / "scores.json").unlink()
    assert compare([other, first])["paired"] is None
    assert compare([other, first, same])["paired"]["groups"].keys() == {"overall", "a", "b"}
    (other / "scores.json").write_text("[]")
    with pytest.raises(FormatError, match=r"scores\.json does not hold the scores"):
        compare([other, first])
