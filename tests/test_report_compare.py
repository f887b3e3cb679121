"""Runs side by side: what differs, and the merged models paired dialogue by dialogue."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

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
    other = shutil.copytree(reported_run, tmp_path / "other")
    kept = json.loads((other / "scores.json").read_text())
    kept["nll"]["merged"] = [1.1 * nll for nll in kept["nll"]["merged"]]
    (other / "scores.json").write_text(json.dumps(kept))
    same = shutil.copytree(reported_run, tmp_path / "same")
    compared = compare([other, reported_run, same])
    paired = compared["paired"]
    assert paired["against"] == "run"
    bits = sum(kept["nll"]["merged"]) / 1.1 / math.log(2) / sum(kept["content_bytes"])
    overall = paired["groups"]["overall"]
    assert overall["other"]["difference"][0] == pytest.approx(0.1 * bits)
    assert overall["other"]["verdict"] == "worse"
    assert overall["same"]["difference"] == [0, 0, 0]
    assert set(paired["groups"]) == {"overall", "a", "b"}
    assert compared["headline"] == "run leads, and same cannot be told from it"
    assert [line.split(":")[0] for line in compared["conclusions"][1:]] == [
        "other is behind", "same cannot be told from it",
    ]  # fmt: skip
    assert compared["conclusions"][0].startswith(f"run is at {bits:.3f} bits per byte, over 6 held-out dialogues")
    page = compare_page(compared)
    assert 'data-chart="paired"' in page
    assert "against run" in page
    kept["held_out_fingerprint"] = "other"
    (other / "scores.json").write_text(json.dumps(kept))
    assert compare([other, reported_run])["paired"] is None
    (other / "scores.json").unlink()
    assert compare([other, reported_run])["paired"] is None
    assert compare([other, reported_run, same])["paired"]["groups"].keys() == {"overall", "a", "b"}
    (other / "scores.json").write_text("[]")
    with pytest.raises(FormatError, match=r"scores\.json does not hold the scores"):
        compare([other, reported_run])
