"""Tasks of lm-eval, on a task made on the spot; with the harness (marked peer) in an environment of its own.

How to make that environment stands at the head of test_eval_alpaca.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.errors import ConfigError, FusechatError
from fusechat.evaluate.tasks import evaluate_tasks

CHOICES = ["the dog", "a big red cat", "hills"]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"the cat sat on {n}", "choices": CHOICES, "answer": n % 3} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cats.yaml").write_text(
        "task: cats\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
    )
    return folder


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FusechatError, match=r"pip install 'fusechat\[tasks\]'"):
        evaluate_tasks({"m": "m"}, ["cats"])


@torch.no_grad()
def _accuracy(folder: Path) -> float:
    """Choose the continuation of highest log-probability, by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    right = []
    for n in range(12):
        question = f"the cat sat on {n}"
        start = len(tokenizer(question)["input_ids"])
        scores = []
        for choice in CHOICES:
            ids = tokenizer(f"{question} {choice}")["input_ids"]
            logprob = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
            scores.append(sum(float(logprob[t - 1, ids[t]]) for t in range(start, len(ids))))
        right.append(int(np.argmax(scores)) == n % 3)
    return float(np.mean(right))


@pytest.mark.peer
def test_accuracy_is_that_of_choosing_by_hand(task: Path, tiny_world: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not here: see the head of test_eval_alpaca.py")
    command = [
        "eval",
        "tasks",
        str(tiny_world.pivot),
        str(tiny_world.source),
        "--tasks",
        "cats",
        "--include",
        str(task),
    ]
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, (done.output, done.exception)
    results = json.loads((tmp_path / "out.json").read_text())["models"]
    one = results["pivot"]["cats"]
    assert one["samples"] == 12
    assert one["metrics"]["acc,none"]["value"] == pytest.approx(_accuracy(tiny_world.pivot))
    assert one["metrics"]["acc,none"]["standard_error"] > 0
    assert "cats" in done.output


@pytest.mark.peer
def test_unknown_tasks_are_named(task: Path, tiny_world: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not here: see the head of test_eval_alpaca.py")
    with pytest.raises(ConfigError, match="knows no task dogs"):
        evaluate_tasks({"m": tiny_world.pivot}, ["cats", "dogs"], include=task)
