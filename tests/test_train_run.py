"""A whole run whose sources teach at once, one of them of the pivot's own vocabulary; alone and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusechat.errors import ConfigError
from fusechat.ledger import read_ledger
from fusechat.run import run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def twin(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pivot with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("twin") / "twin"
    model = AutoModelForCausalLM.from_pretrained(tiny_world.pivot)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_world.pivot).save_pretrained(folder)
    return folder


def _config(world: Any, twin: Path, out: Path) -> Path:
    chosen_on = out.with_suffix(".jsonl")
    chosen_on.write_text("\n".join(world.dialogues.read_text().splitlines()[:5]))  # which are fused on no longer
    values = {
        "pivot": str(world.pivot),
        "sources": [str(world.source), str(twin)],
        "data": {"train": str(world.dialogues), "held_out_fraction": 0.25, "validation": str(chosen_on)},
        "out": str(out),
        "extract": {"top_k": 4, "max_length_tokens": 200},
        "train": {
            "mode": "multi", "select": "avg_ce", "epochs": 2, "batch_size": 6, "micro_batch_size": 3, "save_steps": 2,
            "learning_rate": 1e-3, "hard_weight": 0.5, "final": "best", "sft_control": False, "packing": True,
        },
        "eval": {"bootstrap_samples": 100},
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def alone(tiny_world: Any, twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "alone"
    run(_config(tiny_world, twin, out))
    return out


def test_all_sources_teach_one_target_and_it_is_the_result(alone: Path) -> None:
    assert [path.name for path in (alone / "targets").iterdir()] == ["multi"]
    assert [path.name for path in (alone / "align").iterdir()] == ["source"]  # the twin needs none
    made = json.loads((alone / "targets" / "multi" / "provenance.json").read_text())
    assert [source["name"] for source in made["sources"]] == ["source", "twin"]
    assert made["measured"]["best_step"] in dict(made["measured"]["held_out_bits_per_byte"])
    target, merged = (load_file(alone / place / "model.safetensors") for place in ("targets/multi", "merged"))
    for name, weight in target.items():
        torch.testing.assert_close(merged[name], weight)
    merge = [line for line in read_ledger(alone / "stages.jsonl") if line["stage"] == "merge" and "note" in line]
    assert [line["note"].partition(",")[0] for line in merge] == ["the one target as it is"]
    assert set(json.loads((alone / "results.json").read_text())["groups"]["overall"]["models"]) == {
        "pivot", "source source", "source twin", "target multi", "merged",
    }  # fmt: skip


def test_weights_of_all_sources_teach_and_merge_their_own_targets(tiny_world: Any, twin: Path, tmp_path: Path) -> None:
    out = tmp_path / "weighted"
    run(_config(tiny_world, twin, out), [
        "train.mode=pairwise", "train.select=weighted", "train.source_weights={pivot: 0, source: 1, twin: 2}",
        "train.max_steps=2", "train.sft_control=true", "merge.method=linear", "merge.weights=[1, 3]",
    ])  # fmt: skip
    targets = {name: out / "targets" / name for name in ("source", "twin", "sft")}
    asked = {
        name: json.loads((target / "provenance.json").read_text())["request"]["train"]["source_weights"]
        for name, target in targets.items()
    }
    assert asked == {"source": {"pivot": 0, "source": 1}, "twin": {"pivot": 0, "twin": 2}, "sft": {"pivot": 0}}
    one, other = (load_file(targets[name] / "model.safetensors") for name in ("source", "twin"))
    for name, weight in load_file(out / "merged" / "model.safetensors").items():
        torch.testing.assert_close(weight, (one[name] + 3 * other[name]) / 4)


def test_the_held_out_dialogues_may_not_choose(tiny_world: Any, twin: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best needs data\.validation"):
        run(_config(tiny_world, twin, tmp_path / "x"), ["data.validation=null"])


@pytest.mark.slow
def test_a_run_under_torchrun_gives_the_same(tiny_world: Any, twin: Path, alone: Path, tmp_path: Path) -> None:
    config = _config(tiny_world, twin, tmp_path / "two")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "fusechat", "run", str(config)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("everything is in") == 1
    ours, theirs = (load_file(out / "merged" / "model.safetensors") for out in (tmp_path / "two", alone))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2e-4)
