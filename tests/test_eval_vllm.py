"""A real vLLM as judge and as the model that answers; `make test-vllm` makes its environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm_server import API_KEY, VERDICT

from fusechat.evaluate.answers import answer_benchmark
from fusechat.evaluate.benchmark import load_benchmark
from fusechat.evaluate.endpoint import Client, Endpoint, EndpointError
from fusechat.evaluate.judge import Sampling, judge_answers
from fusechat.evaluate.mtbench import load_answers, load_questions, parse_rating
from fusechat.evaluate.ratings import ratings_table

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: run `make test-vllm`")

NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
TEMPLATES = ("{question} {answer}", "{ref_answer_1} {question} {answer}")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    questions = [
        {"question_id": n, "category": ("math", "writing")[n % 2], "turns": ["say the cat?", "and again?"]}
        for n in range(1, 5)
    ]
    prompts = [
        {"name": name, "system_prompt": "Rate it.", "prompt_template": TEMPLATES["math" in name]} for name in NAMES[:2]
    ] + [
        {"name": name, "system_prompt": "Rate it.", "prompt_template": "{question_2} {answer_1} {answer_2}"}
        for name in NAMES[2:]
    ]
    answers = [{"question_id": n, "choices": [{"turns": ["the cat sat", "on a mat"]}]} for n in range(1, 5)]
    out = {}
    for name, rows in (("questions", questions), ("prompts", prompts), ("references", answers), ("tiny", answers)):
        out[name] = tmp_path / f"{name}.jsonl"
        out[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out | {"judgments": tmp_path / "judgments.jsonl"}


def _endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url=url, **({"model": "judge", "api_key": API_KEY, "retries": 1, "backoff_s": 0.1} | options))


def test_a_vllm_server_judges(judge_server: str, files: dict[str, Path]) -> None:
    answers = {"tiny": files.pop("tiny")}
    sampling = Sampling(max_tokens=24)
    with pytest.raises(EndpointError, match="refuses the API key"):
        judge_answers(answers, **files, endpoint=_endpoint(judge_server, api_key="sk-wrong"), sampling=sampling)
    with pytest.raises(EndpointError, match="knows no model other"):
        judge_answers(answers, **files, endpoint=_endpoint(judge_server, model="other"), sampling=sampling)
    rows = judge_answers(answers, **files, endpoint=_endpoint(judge_server), sampling=sampling)
    assert len(rows) == 8
    assert all(row["score"] == parse_rating(row["judgment"]) for row in rows)
    assert sum(row["judgment"].strip() == VERDICT for row in rows) >= 6
    table = ratings_table(rows, load_questions(files["questions"]), samples=100)
    assert table["groups"]["overall"]["models"]["tiny"]["rating"][0] == pytest.approx(7, abs=1)
    with files["judgments"].open() as file:
        assert len(file.readlines()) == 8


def test_a_vllm_server_gives_the_log_probabilities_that_alpaca_eval_reads(judge_server: str) -> None:
    choice = Client(endpoint=_endpoint(judge_server)).chat(
        [{"role": "user", "content": "m or M?"}], max_tokens=1, temperature=1, logprobs=True, top_logprobs=5
    )
    top = choice["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == 5
    assert all(entry["logprob"] <= 0 and isinstance(entry["token"], str) for entry in top)


def test_vllm_in_process_answers_as_transformers_does(
    judge: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    from vllm.platforms import current_platform

    from fusechat.evaluate.write_hf import HfWriter
    from fusechat.evaluate.write_vllm import VllmWriter

    memory = {"kv_cache_memory_bytes": 100_000_000} if current_platform.is_cpu() else {"gpu_memory_utilization": 0.3}
    writers = {
        "hf": lambda: HfWriter(str(judge), template="own", block=4, dtype="float32"),
        "vllm": lambda: VllmWriter(
            str(judge), template="own", block=4, dtype="float32", enforce_eager=True, max_model_len=512, **memory
        ),
    }
    for name, writer in writers.items():
        answer_benchmark(
            load_benchmark(str(files["questions"]), None),
            writer,
            tmp_path / f"{name}.jsonl",
            model_id="m",
            answerer={},
            temperature=0.0,
            max_tokens=16,
        )
    answers = load_answers(tmp_path / "hf.jsonl")
    assert load_answers(tmp_path / "vllm.jsonl") == answers
    assert sum(turns == [VERDICT, VERDICT] for turns in answers.values()) >= 3
