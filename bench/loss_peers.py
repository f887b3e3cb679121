"""Our losses against those of other packages: the same inputs, equal gradients first, then turns, each in its process.

A peer runs by its own Python (--against PEER=PYTHON), so that it brings the torch and Triton it wants; ours is timed by
the same lines (bench/loss_contender.py). What needs a GPU says so on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusechat.bench.claims import Claim, absent, at_least
from fusechat.bench.peers import peer_command, peer_python, peer_version
from fusechat.bench.timing import Samples, ratio

WORKER = Path(__file__).with_name("loss_contender.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two cases of bench/loss_contender.py that compute the same."""

    name: str
    peer: str
    what: str
    ours: str
    theirs: str
    on_cpu: bool = True
    note: str = ""

    @property
    def against(self) -> str:
        """Return the opponent's name in a claim."""
        return f"{self.peer}, {self.what}"


TEACHER = "their teacher is dense: its head's product is theirs alone"
LINEAR = (
    Pair(
        name="with lm_head, hard labels",
        peer="cut-cross-entropy",
        what="torch.compile",
        ours="ours",
        theirs="cce compiled",
    ),
    Pair(
        name="with lm_head, hard labels",
        peer="cut-cross-entropy",
        what="cce",
        ours="ours",
        theirs="cce",
        on_cpu=False,
    ),
    Pair(
        name="with lm_head, hard labels",
        peer="liger-kernel",
        what="fused linear",
        ours="ours",
        theirs="liger linear",
        on_cpu=False,
    ),
    Pair(
        name="with lm_head, KL to a teacher",
        peer="liger-kernel",
        what="chunked, compiled",
        ours="ours kl",
        theirs="liger kl",
        note=TEACHER,
    ),
    Pair(
        name="with lm_head, JSD to a teacher",
        peer="liger-kernel",
        what="chunked, compiled",
        ours="ours jsd",
        theirs="liger jsd",
        note=TEACHER,
    ),
)
LOGITS = (
    Pair(
        name="logits, hard labels",
        peer="transformers",
        what="ForCausalLMLoss",
        ours="ours logits",
        theirs="transformers logits",
    ),
    Pair(
        name="logits, hard labels",
        peer="liger-kernel",
        what="cross-entropy",
        ours="ours logits",
        theirs="liger logits",
        on_cpu=False,
    ),
)


class Contender:
    """A case of bench/loss_contender.py, running."""

    def __init__(self, case: str, python: str | None, folder: Path, device: str) -> None:
        """Start it and wait for its gradients; raises RuntimeError with its last words when it fails."""
        ours = [sys.executable, "-m", "fusechat.bench.loss_contender"]
        start = ours if python is None else [*peer_command(python), WORKER]
        self._case = case
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*start, case, folder, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.samples = Samples()
        self.extra_mib: float = self._answer()["extra_mib"]

    def call(self) -> None:
        """Let it compute once more, and keep what that took."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        took = self._answer()
        self.samples.cpu_s.append(took["cpu_s"])
        self.samples.wall_s.append(took["wall_s"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Compilers of the peer print what they like.
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines() or ["no word"]
        self.close()
        raise RuntimeError(f"{self._case} failed: {words[-1]}")


def peer_claims(
    pairs: Sequence[Pair], inputs: dict[str, torch.Tensor], against: Sequence[str], device: str, rounds: int
) -> list[Claim]:
    """Compare every pair on `inputs` (hidden [N, D] and weight [V, D], or logits [N, V]; labels, ids, logprobs)."""
    claims = []
    tolerance = 1e-4 if all(t.dtype != torch.bfloat16 for t in inputs.values()) else 2e-2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.save({name: tensor.detach().cpu() for name, tensor in inputs.items()}, folder / "inputs.pt")
        for pair in pairs:
            python = peer_python(pair.peer, against)
            if python is None:
                claims.append(
                    absent(pair.name, pair.against, "≥ 1", f"not installed here: --against {pair.peer}=VENV/bin/python")
                )
            elif device == "cpu" and not pair.on_cpu:
                peer_version(pair.peer, python)
                claims.append(absent(pair.name, pair.against, "≥ 1", "its Triton kernels need a GPU"))
            else:
                claims.append(_race(pair, python, folder, device, rounds, tolerance))
    return claims


def _race(pair: Pair, python: str, folder: Path, device: str, rounds: int, tolerance: float) -> Claim:
    version = peer_version(pair.peer, python)
    ours = Contender(pair.ours, None, folder, device)
    try:
        theirs = Contender(pair.theirs, python, folder, device)
    except RuntimeError as error:
        ours.close()
        return absent(pair.name, pair.against, "≥ 1", f"{version}: {error}")
    check_equal(folder / f"{pair.ours}.pt", folder / f"{pair.theirs}.pt", tolerance)
    for _ in range(rounds):
        ours.call()
        theirs.call()
    for contender in (ours, theirs):
        contender.close()
    clock = "cpu" if device == "cpu" else "wall"
    speed = ratio({"theirs": theirs.samples, "ours": ours.samples}, "theirs", "ours", clock)
    their_ms = 1e3 * theirs.samples.median_s(clock)
    memory = f"+{theirs.extra_mib:,.0f} MiB against our +{ours.extra_mib:,.0f}"
    note = "; ".join(part for part in (f"{version}: {their_ms:.3g} ms, {memory}", pair.note) if part)
    return at_least(pair.name, pair.against, speed, 1, samples=ours.samples, note=note)


def check_equal(ours: Path, theirs: Path, tolerance: float) -> None:
    """Stop when loss or a gradient of two contenders differs by more than `tolerance` of its largest element."""
    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    for name, value in a.items():
        difference = float((value - b[name]).abs().max() / b[name].abs().max())
        if not difference <= tolerance:
            part = "loss" if name == "loss" else f"gradient {name}"
            raise RuntimeError(f"{ours.stem} and {theirs.stem} differ: {part} by {difference:.2g}, not {tolerance:g}")
