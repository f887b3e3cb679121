"""What Liger and cut-cross-entropy compute on the CPU, run by test_loss_peer.py in an environment that has them.

python peer_losses.py IN.npz OUT.npz: every case of IN as loss, gradient of hidden and gradient of weight.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from cut_cross_entropy import linear_cross_entropy
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

IN, OUT = sys.argv[1:]
given = {name: torch.from_numpy(value) for name, value in np.load(IN).items()}
results = {}


def record(case: str, compute) -> None:
    hidden, weight = (given[name].clone().requires_grad_(True) for name in ("hidden", "weight"))
    loss = compute(hidden, weight)
    loss.backward()
    for name, value in (("loss", loss), ("d_hidden", hidden.grad), ("d_weight", weight.grad)):
        results[f"{case}/{name}"] = value.detach().numpy()


for hard_weight, beta, temperature in given["jsd"].tolist():
    # Liger leaves the factor τ² of the soft term to its caller.
    liger = LigerFusedLinearJSDLoss(
        hard_weight, (1 - hard_weight) * temperature**2, beta, temperature=temperature, compiled=False, chunk_size=7
    )
    teacher = given["teacher_hidden"], given["teacher_weight"]
    record(
        f"jsd {hard_weight} {beta} {temperature}",
        lambda h, w, liger=liger, teacher=teacher: liger(h, w, *teacher, given["labels"]),
    )
for softcap in given["softcaps"].tolist():
    record(
        f"cce {softcap}",
        lambda h, w, cap=softcap: linear_cross_entropy(
            h, w, given["labels"], softcap=cap or None, impl="torch_compile"
        ),
    )
np.savez(OUT, **results)
