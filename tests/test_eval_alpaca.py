"""AlpacaEval 2.0: files without the package; with it (marked peer) real results and a judge process.

python -m venv .venv-eval && .venv-eval/bin/pip install -e '.[dev,alpaca,tasks]'
.venv-eval/bin/python -m pytest -m peer tests/test_eval_alpaca.py tests/test_eval_tasks.py
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_stub import Judge, judge_process, preference_of
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.errors import DataError, FormatError, FusechatError, MismatchError
from fusechat.evaluate.alpaca import annotate, load_annotations, load_outputs, package, positions, preference
from fusechat.evaluate.endpoint import Endpoint, EndpointError
from fusechat.evaluate.win_rates import win_rates

REFERENCE = [{"instruction": f"do {n}", "output": f"done {n}", "generator": "base"} for n in range(24)]
OUTPUTS = [{"instruction": f"do {n}", "output": f"did {n}" if n else "done 0", "generator": "mine"} for n in range(24)]


def test_outputs_of_another_benchmark_and_unfinished_ones_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 24 instructions of x are not among the 24 reference outputs"):
        positions([*OUTPUTS[:-1], {"instruction": "other", "output": ""}], REFERENCE, "x")
    with pytest.raises(DataError, match="lacks 4 of 24 instructions: finish it"):
        positions(OUTPUTS[:20], REFERENCE, "x")
    with pytest.raises(DataError, match="an instruction twice"):
        positions([*OUTPUTS[:-1], OUTPUTS[0]], REFERENCE, "x")
    assert positions(OUTPUTS[::-1], REFERENCE, "x") == list(range(24))[::-1]


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"a": 1}')
    with pytest.raises(FormatError, match="no list of JSON objects"):
        load_outputs(file)
    file.write_text('[{"question_id": 1, "choices": []}]')
    with pytest.raises(FormatError, match="entry 0 lacks instruction, output"):
        load_outputs(file)
    with pytest.raises(FormatError, match="entry 0 lacks instruction, output_1"):
        load_annotations(file)


@pytest.mark.parametrize(("value", "read"), [(1.25, 1.25), (None, None), (-1, None), (float("nan"), None), (0, 0.0)])
def test_a_preference_that_was_not_stated_is_none(value: float | None, read: float | None) -> None:
    assert preference({"preference": value}) == read


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "alpaca_eval", None)
    with pytest.raises(FusechatError, match=r"pip install 'fusechat\[alpaca\]'"):
        package()


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    pytest.importorskip("alpaca_eval", reason="the package alpaca_eval is not here: see the head of this file")
    with judge_process() as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, rows in (("outputs", OUTPUTS[::-1]), ("reference", REFERENCE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return {name: tmp_path / name for name in ("outputs.json", "reference.json", "replies.jsonl")}


def _package_files() -> dict[Path, int]:
    """Every file of the installed package and when it was written."""
    folder = Path(package().__file__).parent
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts}


def _annotate(files: dict[str, Path], url: str) -> list[dict[str, object]]:
    outputs, reference, replies = files.values()
    endpoint = Endpoint(url=url, model="stub", retries=1, backoff_s=0.01, timeout_s=20, concurrency=1)
    return annotate(outputs, reference=reference, replies=replies, endpoint=endpoint)


@pytest.mark.peer
@pytest.mark.parametrize("model", ["gpt-3.5-turbo-1106", "FuseChat-Llama-3.1-8B-Instruct"])
def test_published_win_rates_are_reproduced_from_the_annotations(shared_data: Path, model: str) -> None:
    pytest.importorskip("alpaca_eval", reason="the package alpaca_eval is not here: see the head of this file")
    root = shared_data / "chat/alpaca_eval"
    with (root / "leaderboards/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv").open() as file:
        published = {row[""]: row for row in csv.DictReader(file)}[model]
    gamed = shared_data / "chat/fuseeval/IF-Eval/AlpacaEval-2/ref_data/df_gamed.csv"
    rows = load_annotations(root / f"results/{model}/weighted_alpaca_eval_gpt4_turbo/annotations.json")
    reference = load_outputs(root / "results/gpt4_1106_preview/model_outputs.json")
    before = _package_files()
    found = win_rates({model: rows[::-1]}, reference=reference, gamed=gamed, samples=100)["models"][model]
    assert _package_files() == before
    for key in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
        assert found[key] == int(published[key])
    # The annotations' preferences are rounded to ten decimals: the sixteenth digit of their mean is not in the files.
    for key in ("win_rate", "standard_error", "discrete_win_rate"):
        assert found[key] == pytest.approx(float(published[key]), rel=1e-15)
    assert found["length_controlled_winrate"] == pytest.approx(float(published["length_controlled_winrate"]), abs=1e-9)
    assert found["interval"]["win_rate"][0] == pytest.approx(found["win_rate"], rel=1e-12)


@pytest.mark.peer
def test_length_controlled_rates_differ_by_a_paired_interval_that_knows_of_the_fit(shared_data: Path) -> None:
    """Catches the package's own error, which takes the fit as known, and groups that differ between the models."""
    pytest.importorskip("alpaca_eval", reason="the package alpaca_eval is not here: see the head of this file")
    root = shared_data / "chat/alpaca_eval"
    names = ("gpt-3.5-turbo-1106", "FuseChat-Llama-3.1-8B-Instruct")
    files = [root / f"results/{name}/weighted_alpaca_eval_gpt4_turbo/annotations.json" for name in names]
    fits: list[tuple[int, int]] = []
    models = win_rates(
        dict(zip(names, map(load_annotations, files), strict=True)),
        reference=load_outputs(root / "results/gpt4_1106_preview/model_outputs.json"),
        gamed=shared_data / "chat/fuseeval/IF-Eval/AlpacaEval-2/ref_data/df_gamed.csv",
        samples=100,
        progress=lambda done, of: fits.append((done, of)),
    )["models"]
    assert fits[-1] == (42, 42)
    levels = [models[name]["length_controlled_winrate"] for name in names]
    for name, level in zip(names, levels, strict=True):
        value, low, high = models[name]["length_controlled_interval"]["length_controlled_winrate"]
        assert value == level
        assert (high - low) / 2 > 1.96 * models[name]["lc_standard_error"]
    paired = models[names[1]]["length_controlled_interval"]
    value, low, high = paired["difference_to_gpt-3.5-turbo-1106"]
    assert value == pytest.approx(levels[1] - levels[0])
    assert 40 < low < value < high < 52
    assert paired["p_holm"] < 1e-6


@pytest.mark.peer
def test_a_judge_process_annotates_and_nothing_is_asked_for_twice(judge: Judge, files: dict[str, Path]) -> None:
    before = _package_files()
    with pytest.raises(EndpointError, match="revoked"):
        _annotate(files, judge.url("revoked", "x"))
    rows = _annotate(files, judge.url("good", "rest"))
    assert judge.counts("good", "rest")["requests"] == 23 - 5  # one output equals the reference's: a draw unasked
    assert len(_annotate(files, judge.url("good", "rest"))) == 24
    assert judge.counts("good", "rest")["requests"] == 23 - 5
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in REFERENCE]
    assert rows[0]["preference"] == 1.5
    asked = {}
    for line in files["replies.jsonl"].read_text().splitlines():
        row = json.loads(line)
        asked[row["prompt"]] = row
    for n, row in enumerate(rows[1:], 1):
        prompt = next(p for p in asked if f'"""do {n}"""' in p)
        messages = package().utils.prompt_to_chatml(prompt)
        m = preference_of(json.dumps(messages, sort_keys=True))
        mine_is_m = prompt.index(f"did {n}") < prompt.index(f"done {n}")
        assert row["preference"] == pytest.approx(1 + (m if mine_is_m else 1 - m))
    assert _package_files() == before


@pytest.mark.peer
def test_a_judge_without_log_probabilities_is_said_to_be_none(judge: Judge, files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"AlpacaEval 2\.0 needs a judge that returns log-probabilities"):
        _annotate({**files, "outputs.json": _without_draw(files["outputs.json"])}, judge.url("bare", "x"))
    files["replies.jsonl"].write_text('{"question_id": 81}\n')
    with pytest.raises(MismatchError, match="no file of AlpacaEval replies"):
        _annotate(files, judge.url("good", "y"))


def _without_draw(path: Path) -> Path:
    path.write_text(path.read_text().replace("done 0", "did 0"))
    return path


@pytest.mark.peer
def test_the_command_prints_win_rates_and_counts_what_was_not_stated(
    judge: Judge, files: dict[str, Path], tmp_path: Path
) -> None:
    reference = ["--reference", str(files["reference.json"]), "--json", str(tmp_path / "rates.json")]
    server = ["--judge-url", judge.url("good", "cli"), "--judge-model", "stub"]
    done = CliRunner().invoke(
        app, ["eval", "alpaca", str(files["outputs.json"]), *reference, *server, "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    written = tmp_path / "out" / "mine" / "annotations.json"
    rows = load_annotations(written)
    rate = sum(row["preference"] - 1 for row in rows) / 24 * 100
    assert json.loads((tmp_path / "rates.json").read_text())["models"]["mine"]["win_rate"] == pytest.approx(rate)
    rows[3]["preference"] = None
    written.write_text(json.dumps(rows))
    done = CliRunner().invoke(app, ["eval", "winrates", str(written), *reference])
    assert done.exit_code == 0, done.output
    assert "1 replies without a preference are in no figure" in done.output
    assert json.loads((tmp_path / "rates.json").read_text())["models"]["mine"]["n_total"] == 23


@pytest.mark.peer
def test_length_control_wants_the_whole_official_list(judge: Judge, tmp_path: Path) -> None:
    gamed = tmp_path / "df_gamed.csv"
    gamed.write_text(
        "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n0.9,0,0,0,False,m\n"
    )
    keys = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")
    rows = [dict(zip(keys, (r["instruction"], r["output"], "x", "base", "mine", 1.25))) for r in REFERENCE]
    with pytest.raises(DataError, match="knows 1 instructions and the reference has 24"):
        win_rates({"mine": rows}, reference=REFERENCE, gamed=gamed)
    rows[0]["output_1"] = "something else"
    with pytest.raises(DataError, match="other outputs than the reference's"):
        win_rates({"mine": rows}, reference=REFERENCE)
