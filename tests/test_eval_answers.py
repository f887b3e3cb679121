"""Answers to benchmarks: what is asked, the files' forms, resuming, and each backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_stub import Judge, judge_process
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.commands.evaluate.names import key_values
from fusechat.errors import ConfigError, DataError, FusechatError, MismatchError
from fusechat.evaluate.alpaca import load_outputs
from fusechat.evaluate.answers import Reply, Request, answer_benchmark
from fusechat.evaluate.benchmark import load_benchmark
from fusechat.evaluate.endpoint import Endpoint, EndpointError
from fusechat.evaluate.journal import read_rows
from fusechat.evaluate.mtbench import check_answers, load_answers, load_questions
from fusechat.evaluate.write_hf import HfWriter
from fusechat.evaluate.write_server import ServerWriter
from fusechat.tokenizer import load_tokenizer

CATEGORIES = ["writing", "math", "stem", "other"]
PARROT: Any = {"model_id": "parrot", "answerer": {"model_sha256": "a"}}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {
            "question_id": 81 + n,
            "category": CATEGORIES[n % 4],
            "turns": [f"the cat {n}?" + " red" * (n % 4), "and the dog?"][: 1 + (n != 3)],
        }
        for n in range(10)
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "question.jsonl"


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    rows = [{"dataset": "koala", "instruction": f"say {n}", "output": "theirs"} for n in range(5)]
    (tmp_path / "instructions.json").write_text(json.dumps(rows))
    return tmp_path / "instructions.json"


class Parrot:
    """Repeats what it was asked and how; stops with an error after some calls."""

    concurrency = 1

    def __init__(self, block: int = 3, calls: int = 1000) -> None:
        self.block = block
        self.left = calls

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        said = [" | ".join(m["content"] for m in r.messages) + f" @{r.temperature} #{r.seed}" for r in requests]
        return [Reply(text=f"[{len(requests)}] {text}", finish="stop") for text in said]


def test_the_second_turn_sees_the_first_answer_and_temperatures_go_by_category(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "parrot.jsonl"
    ended = answer_benchmark(load_benchmark(str(questions), None), Parrot, out, **PARROT)
    assert ended == {"stop": 19}
    rows = read_rows(out)
    assert [row["question_id"] for row in rows] == list(range(81, 91))
    assert rows[0]["choices"][0]["turns"] == [
        "[3] the cat 0? @0.7 #0",
        "[3] the cat 0? | [3] the cat 0? @0.7 #0 | and the dog? @0.7 #0",
    ]
    assert [row["choices"][0]["turns"][0].split()[-2] for row in rows[:4]] == ["@0.7", "@0.0", "@0.1", "@0.7"]
    assert len(rows[3]["choices"][0]["turns"]) == 1
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= rows[0].keys()
    check_answers("parrot", load_answers(out), load_questions(questions))


def test_an_interrupted_run_goes_on_and_answers_the_same(questions: Path, tmp_path: Path) -> None:
    benchmark = load_benchmark(str(questions), None)
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    answer_benchmark(benchmark, Parrot, whole, **PARROT)
    with pytest.raises(KeyboardInterrupt):
        answer_benchmark(benchmark, lambda: Parrot(calls=3), resumed, **PARROT)
    assert len(read_rows(resumed)) == 3
    resumed.write_text("".join(resumed.read_text().splitlines(keepends=True)[:2]))  # half a block
    answer_benchmark(benchmark, Parrot, resumed, **PARROT)
    assert load_answers(resumed) == load_answers(whole)
    answer_benchmark(benchmark, lambda: Parrot(calls=0), resumed, **PARROT)  # nothing is asked again


def test_answers_of_another_model_or_setting_are_not_mixed_in(questions: Path, tmp_path: Path) -> None:
    benchmark, out = load_benchmark(str(questions), None), tmp_path / "a.jsonl"
    answer_benchmark(benchmark, Parrot, out, **PARROT)
    changes: list[dict[str, Any]] = [
        {"model_id": "owl"},
        {"answerer": {"model_sha256": "b"}},
        {"temperature": 1.0},
        {"max_tokens": 9},
        {"seed": 1},
    ]
    for change in changes:
        with pytest.raises(MismatchError, match="choose another --out"):
            answer_benchmark(benchmark, Parrot, out, **(PARROT | change))
    questions.write_text(questions.read_text().replace("the cat 0?", "the cow 0?"))
    with pytest.raises(MismatchError, match="question 81"):
        answer_benchmark(load_benchmark(str(questions), None), Parrot, out, **PARROT)
    with pytest.raises(FusechatError, match=r"should end in \.jsonl"):
        answer_benchmark(benchmark, Parrot, tmp_path / "a.txt", **PARROT)


def test_answers_of_the_weights_that_were_there_before_are_not_taken_for_the_new_ones(
    tiny_world: Any, questions: Path, tmp_path: Path
) -> None:
    """Catches a model that was trained again in the same folder and is judged by what the old one said."""
    model, out = tmp_path / "model", tmp_path / "model.jsonl"
    shutil.copytree(tiny_world.pivot, model)
    command = ["eval", "answers", str(model), "--benchmark", str(questions), "--out", str(out), "--max-tokens", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    before = out.read_bytes()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    changes = [["--template", str(tiny_world.source)], ["--dtype", "bfloat16"], ["--seed", "1"], ["--batch-size", "3"]]
    for more in changes:
        assert isinstance(CliRunner().invoke(app, [*command, *more]).exception, MismatchError)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= -1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, MismatchError)
    assert "weights or server" in str(done.exception)
    assert out.read_bytes() == before


def test_instructions_give_alpaca_evals_own_file(instructions: Path, tmp_path: Path) -> None:
    out = tmp_path / "outputs.json"
    answer_benchmark(load_benchmark(str(instructions), None), Parrot, out, **PARROT)
    rows = load_outputs(out)
    assert [row["instruction"] for row in rows] == [f"say {n}" for n in range(5)]
    assert rows[4] == {"dataset": "koala", "instruction": "say 4", "output": "[2] say 4 @0.0 #4", "generator": "parrot"}


def test_the_official_benchmarks_are_checked_to_be_whole(questions: Path, instructions: Path) -> None:
    with pytest.raises(ConfigError, match=r"mt-bench needs --questions: question\.jsonl of FastChat"):
        load_benchmark("mt-bench", None)
    with pytest.raises(DataError, match="has 10 questions and mt-bench has 80"):
        load_benchmark("mt-bench", questions)
    with pytest.raises(DataError, match="has the form of alpaca, not of mt-bench"):
        load_benchmark("mt-bench", instructions)
    with pytest.raises(ConfigError, match="does not exist"):
        load_benchmark("mt_bench", None)
    with pytest.raises(ConfigError, match="leave --questions out"):
        load_benchmark(str(questions), instructions)


def test_the_real_benchmarks_are_read(shared_data: Path) -> None:
    mt_bench = load_benchmark("mt-bench", shared_data / "chat/fastchat/mt_bench/question.jsonl")
    assert [(q.id, len(q.turns)) for q in mt_bench.questions] == [(n, 2) for n in range(81, 161)]
    alpaca = load_benchmark("alpaca", shared_data / "chat/alpaca_eval/results/gpt4_1106_preview/model_outputs.json")
    assert len(alpaca.questions) == 805
    assert {alpaca.temperature(q) for q in alpaca.questions} == {0.0}


@torch.no_grad()
def _greedy(folder: Path, dialogue: list[dict[str, str]], max_tokens: int) -> str:
    """One token at a time, by hand."""
    from transformers import AutoModelForCausalLM

    tokenizer, lm = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    text = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < max_tokens:
        token = int(lm(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_transformers_answers_as_a_token_by_token_loop_does(tiny_world: Any, questions: Path, tmp_path: Path) -> None:
    """Catches padding on the wrong side, a template applied twice, and answers that hold the prompt."""
    benchmark = load_benchmark(str(questions), None)
    for block in (1, 4):
        out = tmp_path / f"tiny{block}.jsonl"
        answer_benchmark(
            benchmark,
            lambda block=block: HfWriter(str(tiny_world.source), template="own", block=block),  # type: ignore[misc]
            out,
            model_id="tiny",
            answerer={},
            temperature=0.0,
            max_tokens=6,
        )
    answers = load_answers(tmp_path / "tiny4.jsonl")
    assert answers == load_answers(tmp_path / "tiny1.jsonl")
    assert len({turns[0] for turns in answers.values()}) > 1  # a model that says one thing would hide a wrong prompt
    for question in benchmark.questions[2:5]:
        dialogue: list[dict[str, str]] = []
        for turn, answer in zip(question.turns, answers[question.id], strict=True):
            dialogue.append({"role": "user", "content": turn})
            assert _greedy(tiny_world.source, dialogue, 6) == answer
            dialogue.append({"role": "assistant", "content": answer})


def test_the_models_own_generation_settings_do_not_act(tiny_world: Any, tmp_path: Path) -> None:
    """Catches a penalty of the checkpoint's that turns greedy decoding into something else."""
    shutil.copytree(tiny_world.pivot, tmp_path / "shy")
    (tmp_path / "shy" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_p": 0.9, "top_k": 2})
    )
    dialogue = [{"role": "user", "content": "the cat?"}]
    request = Request(messages=tuple(dialogue), temperature=0.0, max_tokens=12, seed=0)
    (reply,) = HfWriter(str(tmp_path / "shy"), template="own", block=1)([request])
    assert reply.text == _greedy(tiny_world.pivot, dialogue, 12)


def test_sampling_repeats_with_the_seed(tiny_world: Any) -> None:
    writer = HfWriter(str(tiny_world.pivot), template="own", block=2)

    def sample(seed: int) -> str:
        message = {"role": "user", "content": "the cat?"}
        return writer([Request(messages=(message,), temperature=1.0, max_tokens=12, seed=seed)])[0].text

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_prompt_beyond_the_context_is_an_error_answer_and_others_are_not_cut(tiny_world: Any) -> None:
    writer = HfWriter(str(tiny_world.pivot), template="own", block=3)
    texts = ["the cat? " * 200, "the cat?", "the cat " * 40]

    def ask(*contents: str) -> list[Reply]:
        return writer(
            [
                Request(messages=({"role": "user", "content": c},), temperature=0.0, max_tokens=100, seed=0)
                for c in contents
            ]
        )

    replies = ask(*texts)
    assert (replies[0].text, replies[0].finish) == ("ERROR", "too_long")
    assert replies[1:] == [ask(texts[1])[0], ask(texts[2])[0]]


def test_a_model_without_chat_template_is_named(tiny_world: Any, questions: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.pivot, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
    command = [
        "eval",
        "answers",
        str(tmp_path / "plain"),
        "--benchmark",
        str(questions),
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, DataError)
    assert "has no chat template, and a benchmark of dialogues needs one: give --template" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "--template", str(tiny_world.pivot), "--max-tokens", "2"])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def server() -> Iterator[Judge]:
    with judge_process() as running:
        yield running


def _server(url: str, **options: Any) -> ServerWriter:
    return ServerWriter(Endpoint(url=url, model="m", retries=1, backoff_s=0.01, timeout_s=20, **options))


def test_a_server_answers_both_turns(server: Judge, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "server.jsonl"
    benchmark = load_benchmark(str(questions), None)
    answer_benchmark(benchmark, lambda: _server(server.url("echo", "x")), out, model_id="m", answerer={})
    assert load_answers(out)[82] == ["1 the cat 1? red t=0.0", "3 and the dog? t=0.0"]
    assert [row["question_id"] for row in read_rows(out)] == list(range(81, 91))


def test_a_server_that_fails_midway_loses_nothing(server: Judge, questions: Path, tmp_path: Path) -> None:
    out, benchmark = tmp_path / "server.jsonl", load_benchmark(str(questions), None)
    writer = _server(server.url("revoked", "x"), concurrency=1)
    with pytest.raises(EndpointError, match="revoked"):
        answer_benchmark(benchmark, lambda: writer, out, model_id="m", answerer={})
    assert len(read_rows(out)) == 2  # the fifth reply is half of a third answer
    answer_benchmark(benchmark, lambda: _server(server.url("echo", "rest")), out, model_id="m", answerer={})
    assert server.counts("echo", "rest")["requests"] == 19 - 4


def test_the_command_wants_the_url_with_the_server_only(questions: Path, tmp_path: Path) -> None:
    command = ["eval", "answers", "m", "--benchmark", str(questions), "--out", str(tmp_path / "o.jsonl")]
    for more in (["--backend", "server"], ["--url", "http://localhost/v1"]):
        done = CliRunner().invoke(app, [*command, *more])
        assert isinstance(done.exception, ConfigError)


@pytest.mark.parametrize(
    ("backend", "more", "told"),
    [
        ("hf", ["--engine-arg", "seed=1"], "--engine-arg is for --backend vllm, not hf"),
        ("hf", ["--request-field", "top_p=0.9"], "--request-field is for --backend server, not hf"),
        ("vllm", ["--retries", "2"], "--retries is for --backend server, not vllm"),
        ("server", ["--template", "x.jinja"], "--template is for --backend hf or vllm, not server"),
        ("server", ["--dtype", "float32"], "--dtype is for --backend hf or vllm, not server"),
        ("server", ["--batch-size", "4"], "--batch-size is for --backend hf or vllm, not server"),
        ("server", ["--engine-arg", "seed=1"], "--engine-arg is for --backend vllm, not server"),
        ("vllm", ["--engine-arg", "dtype=half"], "give it as --dtype"),
        ("vllm", ["--engine-arg", "model=x"], "give it as MODEL"),
        ("vllm", ["--engine-arg", "template=x"], "give it as --template"),
        ("vllm", ["--engine-arg", "backend=x"], "give it as --backend"),
        ("server", ["--request-field", "a=[1"], "a=[1: the value is not valid YAML"),
        ("server", ["--request-field", "x=2024-01-01"], 'text goes in quotes: x="2024-01-01"'),
    ],
)
def test_options_that_would_not_be_followed_are_refused(
    questions: Path, tmp_path: Path, backend: str, more: list[str], told: str
) -> None:
    url = ["--url", "http://localhost/v1"] if backend == "server" else []
    command = ["eval", "answers", "m", "--benchmark", str(questions), "--out", str(tmp_path / "o.jsonl")]
    done = CliRunner().invoke(app, [*command, "--backend", backend, *url, *more])
    assert isinstance(done.exception, ConfigError), done.output
    assert told in str(done.exception)
    assert "\n" not in str(done.exception)


def test_engine_arguments_are_read_as_yaml() -> None:
    assert key_values(["a=2", "b=0.5", "c=true", "d=x=y"]) == {"a": 2, "b": 0.5, "c": True, "d": "x=y"}
    assert key_values(['a="2024-01-01"', "b={c: [1, null]}"]) == {"a": "2024-01-01", "b": {"c": [1, None]}}
    for word, told in (("a", "the form key=value"), ("=1", "the form key=value"), ("a=2024-13-01", "no JSON form")):
        with pytest.raises(ConfigError, match=told):
            key_values([word])
