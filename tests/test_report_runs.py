"""The report of runs of every kind: against the best target, with twins of the pivot, of revisions, of a sweep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import fusechat
from fusechat.config import load_config
from fusechat.layout import Layout
from fusechat.report import charts, report
from fusechat.report.conclusions import conclude
from fusechat.report.facts import gather
from fusechat.report.page import html_page, markdown_page
from fusechat.report.words import signed
from fusechat.split import load_split


@pytest.mark.parametrize(
    ("difference", "answer"),
    [
        ([-0.2, -0.3, -0.1], "Merging improved on the best single target, source"),
        ([0.2, 0.1, 0.3], "Merging lost against the best single target, source"),
        ([0.1, -0.3, 0.3], "Merging shows no difference to the best single target, source"),
    ],
)
def test_the_merge_is_compared_with_the_best_target_by_a_paired_interval(
    reported_run: Path, tmp_path: Path, difference: list[float], answer: str
) -> None:
    run = shutil.copytree(reported_run, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["merged_to"]["target source"]["difference"] = difference
    (run / "results.json").write_text(json.dumps(results))
    told = [line for line in conclude(gather(Layout(out=run)))["outcome"] if "single target" in line]
    assert told[0].startswith(answer)
    assert f"interval {signed(difference[1])} to {signed(difference[2])}, paired" in told[0]
    del results["merged_to"]  # a run of before the pair was kept
    (run / "results.json").write_text(json.dumps(results))
    told = [line for line in conclude(gather(Layout(out=run)))["outcome"] if "single target" in line]
    assert "kept no interval" in told[0]


def test_a_source_of_a_revision_is_found_by_the_name_the_run_gives_it(reported_run: Path, tmp_path: Path) -> None:
    """Catches artefacts looked for under `source@v1`, and a report that says they are not there."""
    run = shutil.copytree(reported_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for model in ("owner/source@v1", "owner/source@refs/pr/1"):
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"sources": [{"model": model, "name": ""}]}))
        told = gather(Layout(out=run))
        assert told["source_names"] == ["source"]
        assert told["provenance"]["models"]["source"] is not None
        assert told["sources"]["absent"] == told["training"]["absent"] == []


def test_dialogues_a_twin_ends_otherwise_are_not_said_to_be_unencodable(
    reported_run: Path, tiny_world: Any, tmp_path: Path
) -> None:
    """Catches a source of the pivot's vocabulary with another end of turn whose dialogues count as not encoded."""
    run, twin = shutil.copytree(reported_run, tmp_path / "run"), reported_run / "targets" / "source"
    train = load_split(load_config(run / "config.yaml")).train
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<s>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings: Any = {"top_k": 4, "max_length_tokens": 200, "template": str(tmp_path / "other.jinja")}
    fusechat.extract(str(twin), train, run / "extract" / "twin", **settings)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"sources": [{"model": str(twin), "name": "twin"}]}))
    told = gather(Layout(out=run))
    source = told["sources"]["by_source"]["twin"]
    assert (source["compared"], source["differing"]) == (0, source["n_dialogues"])
    (line,) = conclude(told)["sources"]
    assert f"{source['n_dialogues']} dialogues cannot be compared: its tokens there are not the pivot's" in line
    assert "could not encode" not in line
    html_page(told)


def test_a_source_of_the_pivots_vocabulary_needs_no_alignment_and_has_its_share(
    reported_run: Path, tiny_world: Any, tmp_path: Path
) -> None:
    """Catches a finished run that says of such a source that it is not aligned yet; its shares are those of its aligned
    store."""
    run, twin = tmp_path / "run", reported_run / "targets" / "source"
    shutil.copytree(reported_run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    settings: Any = {"top_k": 4, "max_length_tokens": 200}
    train = load_split(load_config(run / "config.yaml")).train
    fusechat.extract(str(twin), train, run / "extract" / "twin", **settings)
    both = config | {"sources": [*config["sources"], {"model": str(twin), "name": "twin"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(both))
    told = gather(Layout(out=run))
    assert told["sources"]["absent"] == told["alignment"]["absent"] == []
    page, markdown = html_page(told), markdown_page(told)
    for text in (page, markdown):
        assert "twin needs none: the tokens are the pivot" in text
        assert "Not aligned yet" not in text
    (run / "config.yaml").write_text(yaml.safe_dump(both | {"sources": both["sources"][1:]}))
    alone = gather(Layout(out=run))
    assert "missing" not in alone["alignment"]
    html_page(alone)
    markdown_page(alone)
    fusechat.align(run / "extract" / "pivot", run / "extract" / "twin", run / "align" / "twin")
    aligned = gather(Layout(out=run))
    found, expected = (facts["sources"]["by_source"]["twin"] for facts in (alone, aligned))
    assert found["all"] == expected["all"]
    assert found["all"]["n_rows_won"] > 0
    assert found["by_category"] == expected["by_category"]
    assert found["by_length"] == expected["by_length"]
    for key in ("source_bits_per_byte", "pivot_bits_per_byte"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)


def test_the_merges_of_a_sweep_stand_in_the_report(reported_run: Path, tmp_path: Path) -> None:
    """Catches a sweep whose table stays in its file, an order that is not by merit, and names only the code has."""
    run = shutil.copytree(reported_run, tmp_path / "run")
    assert gather(Layout(out=run))["merge"]["sweep"] is None
    tried = {
        "sce variant=paper select_topk=0.1": ([4.4, 4.3, 4.5], [2.7, 2.6, 2.8], [0.17, 0.2]),
        "linear weight=1.0": ([1.751, 1.7, 1.8], [0.0, 0.0, 0.0], None),
        "varm": ([1.752, 1.7, 1.8], [0.001, -0.001, 0.003], [1.0, 1.0]),
    }
    merges = {
        name: {"bits_per_byte": bits, "difference_to_best": gap, "surviving_share": kept}
        for name, (bits, gap, kept) in tried.items()
    }
    table = {"format": "fusechat.sweep", "best": "linear weight=1.0", "n_dialogues": 460, "merges": merges}
    (run / "merged" / "sweep.json").write_text(json.dumps(table))
    page = report(run).read_text(encoding="utf-8")
    told = json.loads((run / "report.json").read_text())["merge"]["sweep"]["merges"]
    assert [one["label"] for one in told] == ["linear, weight 1.0", "varm", "sce paper, τ 0.1"]
    assert [one["least_surviving"] for one in told] == [None, 1.0, 0.17]
    assert [one["verdict"] for one in told] == ["undecided", "undecided", "worse"]
    assert "varm cannot be told from it" in page
    assert "The worst, sce paper, τ 0.1, loses 2.700." in page
    assert 'data-chart="sweep"' in page
    assert "| sce paper, τ 0.1 | 4.400 [4.300, 4.500] | +2.700 [+2.600, +2.800] | 17 % |" in (
        run / "report.md"
    ).read_text(encoding="utf-8")


def test_weights_are_shown_as_shares() -> None:
    """Catches a linear merge's weights, one each, drawn as if each target had all."""
    assert charts._shares([1.0, 3.0]) == [0.25, 0.75]
    assert charts._shares([None, 2.0]) == [None, 1.0]
    assert charts._shares([0.0, 0.0]) == [None, None]
