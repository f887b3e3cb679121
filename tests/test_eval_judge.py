"""Judging end to end, with a judge that is a process of its own and behaves as badly as judges do."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from judge_stub import KEY, Judge, judge_process, rating_of
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.errors import FormatError, FusechatError, MismatchError
from fusechat.evaluate.endpoint import Client, Endpoint, EndpointError, for_each
from fusechat.evaluate.journal import open_journal, read_rows
from fusechat.evaluate.judge import judge_answers

N_QUESTIONS, N_MODELS, N_TURNS = 6, 2, 2
ALL = N_QUESTIONS * N_MODELS * N_TURNS


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with judge_process() as running:
        yield running


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark of MT-Bench's form, answered by two models."""

    folder: Path

    @property
    def files(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.jsonl" for name in ("questions", "prompts", "references", "judgments")}

    @property
    def answers(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.jsonl" for name in ("sft", "fused")}

    def judge(self, url: str, **options: object) -> list[dict[str, object]]:
        repeats = options.pop("repeats", 1)
        endpoint = {"retries": 2, "backoff_s": 0.01, "timeout_s": 20.0, "concurrency": 4} | options
        one = Endpoint(url=url, model="stub", **endpoint)  # type: ignore[arg-type]
        return judge_answers(self.answers, **self.files, endpoint=one, repeats=repeats)  # type: ignore[arg-type]

    def kept(self) -> list[dict[str, object]]:
        return read_rows(self.files["judgments"])


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(folder=tmp_path)
    ids = range(81, 81 + N_QUESTIONS)
    categories = itertools.cycle(["writing", "math", "coding"])
    _write(
        bench.files["questions"],
        [{"question_id": q, "category": c, "turns": [f"q{q}", f"and {q}"]} for q, c in zip(ids, categories)],
    )
    ends = {
        "single-v1": "{question}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    }
    ends["single-math-v1"] = "{ref_answer_1}|" + ends["single-v1"]
    ends["single-math-v1-multi-turn"] = "{ref_answer_1}|{ref_answer_2}|" + ends["single-v1-multi-turn"]
    _write(
        bench.files["prompts"],
        [{"name": n, "system_prompt": "Rate.", "prompt_template": t} for n, t in ends.items()],
    )
    for name in ("references", *bench.answers):
        turns = [(q, [f"{name} says {q}", f"{name} adds {q}"]) for q in ids]
        path = bench.folder / f"{name}.jsonl"
        _write(path, [{"question_id": q, "choices": [{"index": 0, "turns": t}]} for q, t in turns])
    return bench


def test_every_turn_of_every_model_is_judged_once_and_rated_as_the_judge_said(bench: Bench, judge: Judge) -> None:
    rows = bench.judge(judge.url("good", "all"))
    assert len({(r["model"], r["question_id"], r["turn"]) for r in rows}) == len(rows) == ALL
    assert all(row["score"] == rating_of(str(row["user_prompt"])) for row in rows)
    assert {row["judge"][1] for row in rows} == {  # type: ignore[index]
        "single-v1",
        "single-math-v1",
        "single-v1-multi-turn",
        "single-math-v1-multi-turn",
    }
    assert bench.kept() == rows


def test_run_again_nothing_is_asked_for_twice(bench: Bench, judge: Judge) -> None:
    first = bench.judge(judge.url("good", "again"))
    assert bench.judge(judge.url("good", "again")) == first
    assert judge.counts("good", "again")["requests"] == ALL
    assert len(bench.judge(judge.url("good", "again"), repeats=3)) == 3 * ALL
    assert judge.counts("good", "again")["requests"] == 3 * ALL


def test_a_revoked_key_stops_the_work_and_the_rest_follows_later(bench: Bench, judge: Judge) -> None:
    with pytest.raises(EndpointError, match=r"wants an API key .*revoked"):
        bench.judge(judge.url("revoked", "x"), concurrency=1)
    assert len(bench.kept()) == 5
    assert len(bench.judge(judge.url("good", "rest"))) == ALL
    assert judge.counts("good", "rest")["requests"] == ALL - 5


def test_single_refused_requests_do_not_hold_up_the_others(bench: Bench, judge: Judge) -> None:
    with pytest.raises(FusechatError, match=r"4 of 24 judgments could not be had .*HTTP 400.*prompt is too long"):
        bench.judge(judge.url("sometimes", "x"), concurrency=1)
    assert len(bench.kept()) == ALL - 4
    assert len(bench.judge(judge.url("good", "refused"))) == ALL


@pytest.mark.parametrize("mode", ["limited", "flaky"])
def test_rate_limits_and_overload_are_waited_out(bench: Bench, judge: Judge, mode: str) -> None:
    assert len(bench.judge(judge.url(mode, "x"))) == ALL
    assert judge.counts(mode, "x")["requests"] == 2 * ALL


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("closed", "still limits the rate after 3 tries: lower the concurrency"),
        ("html", r"1[1-4] requests failed.*answers no chat completion \(is it the API's root\?\): <html>"),
        ("junk", "answers no chat completion"),
        ("unknown", "knows no model stub, .*does not exist"),
    ],
)
def test_a_judge_that_is_none_stops_the_work_with_one_line(bench: Bench, judge: Judge, mode: str, message: str) -> None:
    with pytest.raises(EndpointError, match=message) as caught:
        bench.judge(judge.url(mode, "x"))
    assert "\n" not in str(caught.value)
    assert bench.kept() == []
    assert judge.counts(mode, "x")["requests"] <= 15


def test_a_judge_that_is_down_is_named_at_once(bench: Bench) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=r"cannot be reached .*: start it, or correct the URL"):
        bench.judge(url)


def test_a_judge_that_is_too_slow_is_said_to_be(bench: Bench, judge: Judge) -> None:
    with pytest.raises(EndpointError, match=r"gives no answer within 0\.2 s: raise the timeout"):
        bench.judge(judge.url("slow", "x"), timeout_s=0.2)


def test_a_wrong_key_is_refused_before_anything_is_sent_and_never_shown(bench: Bench, judge: Judge) -> None:
    with pytest.raises(EndpointError, match="refuses the API key in MY_KEY") as caught:
        bench.judge(judge.url("key", "x"), api_key="sk-wrong", api_key_name="MY_KEY")
    assert "sk-wrong" not in str(caught.value)
    with pytest.raises(EndpointError, match=r"wants an API key .*set the environment variable MY_KEY"):
        bench.judge(judge.url("key", "x"), api_key_name="MY_KEY")
    assert "requests" not in judge.counts("key", "x")
    assert len(bench.judge(judge.url("key", "x"), api_key=KEY)) == ALL
    assert KEY not in bench.files["judgments"].read_text()


def test_no_more_requests_at_a_time_than_allowed(bench: Bench, judge: Judge) -> None:
    bench.judge(judge.url("wide", "x"), concurrency=3)
    assert judge.counts("wide", "x")["most_at_a_time"] == 3


def test_requests_keep_to_the_rate(bench: Bench, judge: Judge) -> None:
    bench.judge(judge.url("good", "rate"), requests_per_minute=1200)
    starts = sorted(judge.counts("good", "rate")["starts"])
    assert starts[-1] - starts[0] >= (ALL - 1) * 0.05 * 0.8


def test_judgments_of_other_answers_are_not_mixed_in(bench: Bench, judge: Judge) -> None:
    bench.judge(judge.url("good", "mixed"))
    text = bench.answers["sft"].read_text()
    bench.answers["sft"].write_text(text.replace("sft adds 83", "sft regrets 83"))
    with pytest.raises(MismatchError, match="judgment of sft on question 83, turn 2, with another answer"):
        bench.judge(judge.url("good", "mixed"))
    _write(bench.files["judgments"], [{"instruction": "x"}])
    with pytest.raises(MismatchError, match="no file of judgments"):
        bench.judge(judge.url("good", "mixed"))


def test_a_line_cut_by_a_kill_is_judged_again_and_nothing_else(bench: Bench, judge: Judge) -> None:
    bench.judge(judge.url("good", "cut"))
    whole = bench.files["judgments"].read_bytes()
    bench.files["judgments"].write_bytes(whole[:-40])
    assert len(bench.judge(judge.url("good", "cut"))) == ALL
    assert judge.counts("good", "cut")["requests"] == ALL + 1
    bench.files["judgments"].write_bytes(whole[:-1])  # only the line's end is missing
    assert len(bench.judge(judge.url("good", "cut"))) == ALL
    assert judge.counts("good", "cut")["requests"] == ALL + 1


def test_a_broken_journal_is_named_by_line(bench: Bench, judge: Judge) -> None:
    bench.files["judgments"].write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(FormatError, match="line 2 is not valid JSON"):
        bench.judge(judge.url("good", "broken"))


def test_two_processes_cannot_write_the_same_judgments(bench: Bench, judge: Judge) -> None:
    with (
        open_journal(bench.files["judgments"]),
        pytest.raises(FusechatError, match="being written by another process"),
    ):
        bench.judge(judge.url("good", "twice"))


def test_what_is_under_way_is_finished_and_kept_when_something_stops_the_rest(judge: Judge) -> None:
    client = Client(endpoint=Endpoint(url=judge.url("wide", "stop"), model="stub", concurrency=4))
    kept = []

    def work(n: int) -> None:
        if n == 5:
            raise KeyboardInterrupt
        kept.append(client.chat([{"role": "user", "content": str(n)}]))

    with pytest.raises(KeyboardInterrupt):
        for_each(range(200), work, concurrency=4)
    assert len(kept) == judge.counts("wide", "stop")["requests"] < 30


def _command(bench: Bench, url: str, *more: str) -> list[str]:
    names = {name: f"--{name}" for name in bench.files} | {"judgments": "--out"}
    files = [option for name, path in bench.files.items() for option in (names[name], str(path))]
    answers = [str(path) for path in bench.answers.values()]
    return ["eval", "judge", *answers, *files, "--judge-url", url, "--judge-model", "stub", *more]


def test_the_command_prints_ratings_and_differences(bench: Bench, judge: Judge) -> None:
    out = bench.folder / "ratings.json"
    done = CliRunner().invoke(app, _command(bench, judge.url("good", "cli"), "--json", str(out)))
    assert done.exit_code == 0, done.output
    assert "difference to sft" in done.output
    table = json.loads(out.read_text())
    printed = CliRunner().invoke(app, _command(bench, judge.url("good", "cli"), "--json", "-"))
    assert json.loads(printed.stdout) == table
    mine = [rating_of(str(row["user_prompt"])) for row in bench.kept() if row["model"] == "fused"]
    assert table["groups"]["overall"]["models"]["fused"]["rating"][0] == pytest.approx(sum(mine) / len(mine))


def test_what_would_be_missed_at_the_end_is_refused_before_anything_is_asked(bench: Bench, judge: Judge) -> None:
    """Catches hours of judging that end with a name that is none, or a table that cannot be written."""
    for options, message in (
        (("--against", "sfft"), "--against sfft is none of the models: there are sft, fused"),
        (("--json", str(bench.files["questions"] / "x" / "out.json")), "is a file: choose another place"),
        (("--json", str(bench.folder)), "is a folder: name a file in it"),
    ):
        done = CliRunner().invoke(app, _command(bench, judge.url("good", "never"), *options))
        assert isinstance(done.exception, FusechatError)
        assert message in str(done.exception)
    assert "requests" not in judge.counts("good", "never")


@pytest.mark.parametrize(("mode", "label"), [("mute", "without a rating"), ("high", "off the scale")])
def test_the_command_shows_what_could_not_be_rated(bench: Bench, judge: Judge, mode: str, label: str) -> None:
    done = CliRunner().invoke(app, _command(bench, judge.url(mode, "cli")))
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if label in line)
    assert line.split()[-2:] == [str(N_QUESTIONS * N_TURNS)] * N_MODELS
    assert "1.00…10.00" in done.output
    every = N_QUESTIONS * N_TURNS * N_MODELS
    assert f"{every} of {every} judgments have no rating on the scale" in done.output
    assert "–" in next(line for line in done.output.splitlines() if line.startswith("overall"))


def test_fields_of_requests_can_be_added_and_taken_away(bench: Bench, judge: Judge) -> None:
    url = judge.url("modern", "cli")
    done = CliRunner().invoke(app, _command(bench, url))
    assert "Unsupported parameter: 'max_tokens'" in str(done.exception)
    fields = ["--request-field", "max_tokens=null", "--request-field", "max_completion_tokens=9"]
    done = CliRunner().invoke(app, _command(bench, url, *fields))
    assert done.exit_code == 0, done.output


def test_a_url_that_is_none_is_refused(bench: Bench) -> None:
    with pytest.raises(FusechatError, match="no URL of an API"):
        bench.judge("localhost:8000")
