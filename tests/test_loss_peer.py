"""Liger's dense distillation losses and cut-cross-entropy on the CPU: a teacher of every token makes ours the same.

python -m venv .venv-peers && .venv-peers/bin/pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1 triton, or
FUSECHAT_LOSS_PEERS=its python.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fusechat.loss import linear_sparse_soft_ce

pytestmark = pytest.mark.peer
N, V, D, TEACHER_D = 33, 101, 24, 40
# Liger's β = 0 is KL(teacher ‖ student) and its β = 1 the reverse.
JSD = [(0.3, 0.5, 1.0), (0.0, 0.1, 1.0), (0.6, 0.8, 2.0), (0.3, 0.0, 1.0), (0.2, 0.0, 3.0), (0.3, 1.0, 1.0)]
SOFTCAPS = [0.0, 5.0]


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    """Two models' hidden states and heads, and labels of which some are ignored."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=rng)
    labels[::5] = -100
    return {
        "hidden": torch.randn(N, D, generator=rng),
        "weight": torch.randn(V, D, generator=rng) / 4,
        "teacher_hidden": torch.randn(N, TEACHER_D, generator=rng),
        "teacher_weight": torch.randn(V, TEACHER_D, generator=rng) / 8,
        "labels": labels,
    }


@pytest.fixture(scope="module")
def theirs(given: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The peers' losses and gradients by case."""
    here = Path(__file__).resolve()
    python = Path(os.environ.get("FUSECHAT_LOSS_PEERS", here.parents[1] / ".venv-peers" / "bin" / "python"))
    if not python.exists():
        pytest.skip("Liger and cut-cross-entropy are not here: see the head of this file")
    source, target = (tmp_path_factory.mktemp("peers") / name for name in ("in.npz", "out.npz"))
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    np.savez(source, **arrays, jsd=np.array(JSD), softcaps=np.array(SOFTCAPS))
    # As written, not compiled: inductor's backward of cut-cross-entropy's torch form fails on the CPU (torch 2.13).
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run([python, here.with_name("peer_losses.py"), source, target], check=True, env=environment)
    return dict(np.load(target))


def compare(theirs: dict[str, np.ndarray], case: str, given: dict[str, torch.Tensor], *teacher, **options) -> None:
    hidden, weight = (given[name].clone().requires_grad_(True) for name in ("hidden", "weight"))
    loss = linear_sparse_soft_ce(hidden, weight, given["labels"], *teacher, **options).loss
    loss.backward()
    for name, value in (("loss", loss), ("d_hidden", hidden.grad), ("d_weight", weight.grad)):
        expected = torch.from_numpy(theirs[f"{case}/{name}"])
        torch.testing.assert_close(value.detach(), expected, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("case", JSD, ids=str)
def test_distillation_is_ligers(case, given, theirs):
    """Catches a swapped β, a wrong direction of KL, a temperature in the hard term, and a mean over ignored rows."""
    hard_weight, beta, temperature = case
    logprobs = torch.log_softmax(given["teacher_hidden"] @ given["teacher_weight"].t(), 1)
    ids = torch.arange(V).expand(N, V)
    divergence = {0.0: "kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    compare(
        theirs, f"jsd {hard_weight} {beta} {temperature}", given, ids, logprobs, hard_weight=hard_weight,
        divergence=divergence, missing="tail", beta=beta, temperature=temperature, student_temperature=temperature,
    )  # fmt: skip


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_cross_entropy_is_cut_cross_entropys(softcap, given, theirs):
    """Catches a softcap without its derivative; their kernel filters gradients, their torch form does not."""
    none = torch.zeros(N, 0, dtype=torch.long), torch.zeros(N, 0)
    compare(theirs, f"cce {softcap}", given, *none, hard_weight=1.0, softcap=softcap or None)
