"""Training on two processes: the same losses and weights as on one, clean ends, and exact resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fusechat
from fusechat.dialogue import load_dialogues

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["epochs=2", "batch_size=8", "micro_batch_size=2", "learning_rate=1e-3", "warmup_ratio=0", "logging_steps=1"]
LORA = ["lora.rank=4", "lora.target_modules=[q_proj,v_proj]"]


@pytest.fixture(scope="module")
def stores(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    dialogues = load_dialogues(tiny_world.dialogues)[:22]  # the last step of an epoch is not whole
    for name in ("pivot", "source"):
        fusechat.extract(str(getattr(tiny_world, name)), dialogues, folder / name, top_k=5)
    fusechat.align(folder / "pivot", folder / "source", folder / "aligned")
    return folder


def _command(world: Any, stores: Path, out: Path, *settings: str) -> list[str]:
    places = ["--pivot-store", str(stores / "pivot"), "--aligned", str(stores / "aligned"), "--out", str(out)]
    return ["-m", "fusechat", "train", str(world.pivot), *places, "--", *SETTINGS, "select=source", *settings]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {"python": [], "torchrun": TORCHRUN}


def _run(launcher: list[str], command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


def _losses(target: Path) -> list[float]:
    return list(json.loads((target / "provenance.json").read_text())["losses"])


def _assert_same(one: Path, other: Path, tolerance: float) -> None:
    assert _losses(one) == pytest.approx(_losses(other), rel=tolerance)
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=tolerance * 20)


@pytest.fixture(scope="module")
def single(tiny_world: Any, stores: Path) -> dict[str, Path]:
    """What one process makes, full and LoRA."""
    made = {}
    for name, settings in (("full", []), ("lora", LORA)):
        made[name] = stores / f"single-{name}"
        done = _run([], _command(tiny_world, stores, made[name], *settings))
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(_losses(made[name])) == 6
    return made


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ddp_gives_what_one_process_gives(
    kind: str, single: Any, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    settings = LORA if kind == "lora" else []
    done = _run(TORCHRUN, _command(tiny_world, stores, tmp_path / "t", *settings))
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same(tmp_path / "t", single[kind], 1e-5)
