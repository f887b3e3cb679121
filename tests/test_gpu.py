"""What only a GPU can show: the kernels compiled for it, and the stages on it. `bench/gpu.sh` runs these."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusechat

TESTS = Path(__file__).parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("checks", ["kernel_checks.py", "sce_checks.py"])
def test_the_kernels_keep_their_definitions(checks: str) -> None:
    """Catches what the interpreter cannot show: races, wrong masks of vector loads, a compiler's own reordering."""
    # Nearly all of the time goes into compiling some two hundred specialisations.
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", *workers, str(TESTS / checks)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.parametrize("side", ["pivot", "source"])
def test_extraction_gives_the_models_own_softmax(tiny_world: Any, tmp_path: Path, side: str) -> None:
    """Catches the top-k kernel in its place, behind a body and a head on the GPU."""
    pytest.importorskip("pydantic", reason="a stage reads its settings by it")
    from extract_world import check_store

    from fusechat.dialogue import load_dialogues

    directory = getattr(tiny_world, side)
    dialogues = load_dialogues(tiny_world.dialogues)
    fusechat.extract(str(directory), dialogues, tmp_path / "s", top_k=7, dtype="float32", device="cuda")
    check_store(tmp_path / "s", directory, logprob_atol=1e-3)  # products may be of TF32


def test_training_follows_the_loss_in_torch(tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the loss kernel in its place: the same run with torch's own form has the same log."""
    pytest.importorskip("pydantic", reason="a stage reads its settings by it")
    from fusechat.dialogue import load_dialogues
    from fusechat.train import train
    from fusechat.train_config import TrainConfig

    dialogues = load_dialogues(tiny_world.dialogues)
    for side in ("pivot", "source"):
        fusechat.extract(str(getattr(tiny_world, side)), dialogues, tmp_path / side, top_k=7, dtype="float32")
    fusechat.align(tmp_path / "pivot", tmp_path / "source", tmp_path / "aligned")
    config = TrainConfig(epochs=2, batch_size=8, micro_batch_size=4, learning_rate=1e-3, hard_weight=0.5)
    losses = {}
    for backend in ("triton", "torch"):
        monkeypatch.setenv("FUSECHAT_LOSS", backend)
        out = tmp_path / backend
        train(str(tiny_world.pivot), tmp_path / "pivot", tmp_path / "aligned", out, config, seed=0)
        lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
        losses[backend] = [line["loss"] for line in lines if "loss" in line]
    assert losses["torch"]
    np.testing.assert_allclose(losses["triton"], losses["torch"], rtol=1e-4)
