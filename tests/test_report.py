"""The report: its numbers are the run's, a partial or broken run is told as far as it goes, hostile text stays text."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_attack import HOSTILE, hostile_facts

from fusechat.errors import ConfigError
from fusechat.layout import Layout
from fusechat.report import report
from fusechat.report.conclusions import conclude, headline
from fusechat.report.facts import SECTIONS, gather
from fusechat.report.page import embedded_json, html_page, json_text, markdown_page
from fusechat.report.sample import MAX_TOKEN_CHARACTERS, token_text
from fusechat.report.words import duration, percent, rate, signed
from fusechat.store import open_aligned, open_topk


class Elements(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "href") and value and not value.startswith(("#", "data:")):
                self.addresses.append(value)


def _strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def facts(reported_run: Path) -> dict[str, Any]:
    return gather(Layout(out=reported_run))


def test_a_run_leaves_its_report_with_every_section(reported_run: Path) -> None:
    page = (reported_run / "report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    for name in SECTIONS:
        assert name in elements.ids
    assert len(elements.ids) == len(set(elements.ids))
    assert not elements.addresses, "the page must need no network"
    assert "Not here:" not in page
    assert len(page.encode()) < 3_000_000
    told = _strict((reported_run / "report.json").read_text(encoding="utf-8"))
    assert not any("missing" in told[name] for name in SECTIONS)
    assert (reported_run / "report.md").read_text(encoding="utf-8").count("\n## ") == len(SECTIONS)


def test_the_numbers_are_those_of_the_artefacts(facts: dict[str, Any], reported_run: Path) -> None:
    results = json.loads((reported_run / "results.json").read_text())
    overall = results["groups"]["overall"]["models"]
    assert facts["outcome"]["difference"] == overall["merged"]["difference_to_sft"]
    assert [g["name"] for g in facts["outcome"]["groups"]] == list(results["groups"])

    # Rows won, the slow way: dialogue by dialogue.
    store = open_aligned(reported_run / "align" / "source")
    pivot = open_topk(reported_run / "extract" / "pivot")
    won = rows = 0
    by_category = {"a": [0, 0], "b": [0, 0]}
    table = json.loads((reported_run / "categories.json").read_text())
    for index in store:
        record = store[index]
        n = int(record["dialogue.pivot_tokens"][0])
        better = bool(record["dialogue.source_nll"][0] < record["dialogue.pivot_nll"][0])
        group = by_category[table["names"][table["category"][index]]]
        rows, won = rows + n, won + n * better
        group[0] += n
        group[1] += n * better
    source = facts["sources"]["by_source"]["source"]
    assert (source["all"]["n_rows"], source["all"]["n_rows_won"]) == (rows, won)
    assert {g["name"]: [g["n_rows"], g["n_rows_won"]] for g in source["by_category"]} == by_category
    assert sum(g["n_rows"] for g in source["by_length"]) == rows
    assert sum(g["n_dialogues"] for g in source["by_length"]) == len(store) == len(source["points"])
    assert rows == sum(len(pivot[i]["row.ids"]) for i in pivot)

    stages = {stage["name"]: stage for stage in facts["cost"]["stages"]}
    assert list(stages) == [
        "extract pivot", "extract source", "align source", "train source", "train sft", "merge", "evaluate",
    ]  # fmt: skip
    on_disk = sum(p.stat().st_size for p in (reported_run / "merged").rglob("*") if p.is_file())
    assert stages["merge"]["disk_bytes"] == on_disk


def test_every_token_of_a_sampled_dialogue_stands_once_and_between_shared_boundaries(
    facts: dict[str, Any], reported_run: Path
) -> None:
    pivot, source = open_topk(reported_run / "extract" / "pivot"), open_topk(reported_run / "extract" / "source")
    for sample in facts["alignment"]["by_source"]["source"]["dialogues"]:
        ours, theirs = pivot[sample["dialogue"]], source[sample["dialogue"]]
        assert len(sample["segments"]) == sample["n_segments"]
        assert sum(len(s["pivot"]) for s in sample["segments"]) == len(ours["row.ids"])
        assert sum(len(s["source"]) for s in sample["segments"]) == len(theirs["row.ids"])
        for segment in sample["segments"]:
            texts = ["".join(t["text"] for t in segment[side]).strip() for side in ("pivot", "source")]
            if "</s>" not in texts:  # the end of a turn is another token in each tokenizer
                assert texts[0] == texts[1]
            # Nothing but the start of a stretch is common to both, so only its first token is aligned.
            assert {t["kind"] for t in segment["pivot"][1:]} <= {"none"}
        first = sample["segments"][0]["pivot"][0]
        gold = np.exp(ours["row.gold_logprob"][0])
        assert first["p"] == pytest.approx(float(gold), abs=1e-4)
        tops = [p for _, p in first["top"]]
        assert tops == sorted(tops, reverse=True)


def test_a_plan_that_was_kept_stands_beside_what_was_measured(reported_run: Path, tmp_path: Path) -> None:
    """Catches a plan of one model shown at another, and a merge whose plan goes by another name."""
    run = shutil.copytree(reported_run, tmp_path / "run")
    sizes = {"host_bytes": 3_000_000, "device_bytes": 0, "disk_bytes": 5_000_000}
    names = (("extract", "pivot", 11.0), ("merge", "sce", 13.0))
    stages = [{"stage": stage, "name": name, "seconds": seconds, **sizes} for stage, name, seconds in names]
    (run / "plan.json").write_text(json.dumps({"stages": stages}))
    report(run)
    told = {
        stage["name"]: stage["planned"] for stage in json.loads((run / "report.json").read_text())["cost"]["stages"]
    }
    assert told["extract pivot"]["seconds"] == 11.0
    assert told["merge"]["seconds"] == 13.0
    assert [name for name, planned in told.items() if planned] == ["extract pivot", "merge"]
    assert f"plan {duration(11)}" in (run / "report.html").read_text()
    assert "(plan 3" in (run / "report.md").read_text()


@pytest.mark.parametrize("kept", [(), ("extract",), ("extract", "align"), ("extract", "align", "targets")])
def test_a_partial_run_says_what_is_missing(reported_run: Path, tmp_path: Path, kept: tuple[str, ...]) -> None:
    run = tmp_path / "partial"
    run.mkdir()
    shutil.copy(reported_run / "config.yaml", run)
    for name in kept:
        shutil.copytree(reported_run / name, run / name)
    page = report(run).read_text(encoding="utf-8")
    told = _strict((run / "report.json").read_text(encoding="utf-8"))
    there = {"provenance"} | ({"sources", "alignment"} if "align" in kept else set())
    there |= {"training"} if "targets" in kept else set()
    assert {name for name in SECTIONS if "missing" not in told[name]} == there
    assert page.count("Not here:") == len(SECTIONS) - len(there) + 1  # the answer on top is missing too
    assert "Not evaluated yet" in page
    assert Elements(page).ids.count("merge") == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not the folder of a run"):
        report(tmp_path)
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        report(tmp_path, tmp_path / "report.pdf")


def test_damaged_files_spoil_their_own_section_only(reported_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(reported_run, run)
    (run / "merged" / "merge_stats.json").write_text('{"a": 3}')
    (run / "align" / "source" / "coverage.json").write_text("not JSON")
    (run / "stages.jsonl").write_text('{"event": "end"}\n')
    told = gather(Layout(out=run))
    assert {name for name in SECTIONS if "missing" in told[name]} == {"merge", "alignment", "training", "cost"}
    assert "coverage.json" in told["alignment"]["missing"]
    html_page(told)


def test_tokenizers_that_moved_leave_the_coverage(reported_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(reported_run, run)
    manifest = run / "extract" / "source" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"model": str(tmp_path / "gone")}))
    told = gather(Layout(out=run))["alignment"]["by_source"]["source"]
    assert "is not there" in told["dialogues"]["missing"]
    assert sum(told["rows"].values()) == pytest.approx(1)


def test_numbers_that_are_not_finite_are_shown_as_such(reported_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reported_run, run)
    results = json.loads((run / "results.json").read_text())
    for group in results["groups"].values():
        for model in ("merged", "target source"):
            group["models"][model] = {
                key: math.nan if key in ("p", "p_holm") else [math.nan] * 3 for key in group["models"][model]
            }
    (run / "results.json").write_text(json.dumps(results))
    told = gather(Layout(out=run))
    assert told["outcome"]["verdict"] == "unknown"
    assert "not finite" in headline(told["outcome"])
    _strict(json_text(told))
    page = html_page(told)
    assert "n/a" in page
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.S).lower().replace("provenance", "")
    assert "NaN" not in markdown_page(told)


def test_hostile_text_stays_text(facts: dict[str, Any]) -> None:
    changed = hostile_facts(facts)
    page = html_page(changed)
    clean, attacked = Elements(html_page(facts)), Elements(page)
    assert attacked.tags.get("img", 0) == 0
    assert attacked.tags["script"] == clean.tags["script"]
    assert attacked.tags["section"] == clean.tags["section"]
    assert "49" not in re.findall(r"☠[^<]{0,40}", page)[0]
    embedded = re.search(r'<script type="application/json" id="samples">(.*?)</script>', page, re.S)
    assert embedded is not None
    assert HOSTILE in json.dumps(_strict(embedded[1]), ensure_ascii=False).replace('\\"', '"').replace(
        "\\u2028", "\u2028"
    )
    lines = markdown_page(changed).splitlines()
    table = [line for line in lines if line.startswith("|") and "rows won" in line]
    assert table[0].count("|") == 6


def test_embedded_json_cannot_close_its_script() -> None:
    text = embedded_json({"a": HOSTILE})
    assert "<" not in text
    assert json.loads(text) == {"a": HOSTILE}


def test_a_token_is_shown_on_one_line_and_cut() -> None:
    class Table:
        def __init__(self, token: bytes) -> None:
            self.value = token

        def token(self, _: int) -> bytes:
            return self.value

    def shown(token: bytes) -> str:
        return token_text(Table(token), 0)  # type: ignore[arg-type]

    assert shown(b"a\nb\t\x00\xff\xe2\x80\xae") == "a⏎b⇥\\x00\\xff\\u202e"
    long = shown(b"x" * 5000)
    assert long.startswith("x" * MAX_TOKEN_CHARACTERS + "…")
    assert "5,000" in long


@pytest.mark.parametrize(
    ("difference", "p", "answer"),
    [
        ([-0.2, -0.3, -0.1], 0.01, "Yes, fusion beat SFT"),
        ([0.2, 0.1, 0.3], 0.01, "No, fusion did worse than SFT"),
        ([-0.1, -0.3, 0.1], 0.4, "No difference to SFT is shown"),
        ([-0.2, -0.3, -0.1], 0.12, "No difference to SFT is shown"),  # six dialogues: their bootstrap is too narrow
    ],
)
def test_the_answer_follows_the_interval_and_the_test(
    reported_run: Path, tmp_path: Path, difference: list[float], p: float, answer: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reported_run, run)
    results = json.loads((run / "results.json").read_text())
    results["groups"]["overall"]["models"]["merged"] |= {"difference_to_sft": difference, "p_holm": p}
    (run / "results.json").write_text(json.dumps(results))
    told = gather(Layout(out=run))
    assert headline(told["outcome"]) == answer
    first = conclude(told)["outcome"][0]
    assert signed(difference[1]) in first
    assert ("too few dialogues to tell" in first) == (p == 0.12)


def test_shares_are_not_rounded_to_all_or_nothing() -> None:
    assert [percent(x) for x in (0.0, 1.0, 0.9999, 0.0001, 0.5, None)] == [
        "0 %", "100 %", ">99 %", "<1 %", "50 %", "n/a",
    ]  # fmt: skip
    assert percent(0.9996, 1) == ">99.9 %"
    assert [rate(x, "models") for x in (1234.0, 1.0, 0.25, None)] == [
        "1.23k models/s",
        "1 models/s",
        "4.0 s a model",
        "n/a",
    ]
    assert [duration(x) for x in (3.21, 61, 3599.7, 3700, 90000)] == [
        "3.2 s", "1 min 1 s", "1 h 0 min", "1 h 1 min", "1 d 1 h",
    ]  # fmt: skip


def test_the_scores_kept_are_those_the_table_was_made_from(reported_run: Path) -> None:
    kept = json.loads((reported_run / "scores.json").read_text())
    results = json.loads((reported_run / "results.json").read_text())
    bits = {name: sum(nll) / math.log(2) / sum(kept["content_bytes"]) for name, nll in kept["nll"].items()}
    overall = results["groups"]["overall"]
    assert {name: cell["bits_per_byte"][0] for name, cell in overall["models"].items()} == pytest.approx(bits)
    assert kept["held_out_fingerprint"] == results["request"]["held_out_fingerprint"]
    by_category = {name: kept["categories"].count(name) for name in set(kept["categories"])}
    assert by_category == {n: g["n_dialogues"] for n, g in results["groups"].items() if n != "overall"}
    assert results["merged_to"]["target source"]["difference"][0] == pytest.approx(
        bits["merged"] - bits["target source"]
    )
