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
    bf16_tolerance: float = 2e-2
    """How far the gradients may differ, in shares of the largest element; in float32 it is 1e-4."""

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
        # Their log-probabilities are of bf16: at 1,024 rows of 8,192 tokens their gradient is 8% off that in float32,
        # ours 0.5%; the difference grows with both. In float32 they agree.
        bf16_tolerance=0.3,
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
        """Start it; it loads its package and computes gradients meanwhile."""
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
        self.extra_mib = float("nan")

    def wait(self) -> None:
        """Wait for its gradients; raises RuntimeError with its last words when it fails."""
        self.extra_mib = self._answer()["extra_mib"]

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
        raise RuntimeError(f"{self._case} failed: {words[-1]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """Inputs of a set of pairs in a folder, and how to compare on them."""

    folder: Path
    against: Sequence[str]
    device: str
    rounds: int
    exact: bool
    """No input is bf16."""

    @classmethod
    def of(
        cls, inputs: dict[str, torch.Tensor], folder: Path, against: Sequence[str], device: str, rounds: int
    ) -> Peers:
        """Write `inputs` (hidden [N, D] and weight [V, D], or logits [N, V]; labels, ids, logprobs) to the folder."""
        torch.save({name: tensor.detach().cpu() for name, tensor in inputs.items()}, folder / "inputs.pt")
        exact = all(t.dtype != torch.bfloat16 for t in inputs.values())
        return cls(folder=folder, against=against, device=device, rounds=rounds, exact=exact)

    def claim(self, pair: Pair) -> Claim:
        """Compare a pair."""
        python = peer_python(pair.peer, self.against)
        if python is None:
            why = f"not installed here: --against {pair.peer}=VENV/bin/python"
            return absent(pair.name, pair.against, "≥ 1", why)
        version = peer_version(pair.peer, python)
        if self.device == "cpu" and not pair.on_cpu:
            return absent(pair.name, pair.against, "≥ 1", "its Triton kernels need a GPU")
        # Both at once: to import a package and to compile it takes longer than what is measured.
        ours = Contender(pair.ours, None, self.folder, self.device)
        theirs = Contender(pair.theirs, python, self.folder, self.device)
        try:
            ours.wait()
            try:
                theirs.wait()
            except RuntimeError as error:
                return absent(pair.name, pair.against, "≥ 1", f"{version}: {error}")
            paths = (self.folder / f"{case}.pt" for case in (pair.ours, pair.theirs))
            apart = check_equal(*paths, 1e-4 if self.exact else pair.bf16_tolerance, self.device)
            for _ in range(self.rounds):
                ours.call()
                theirs.call()
        finally:
            ours.close()
            theirs.close()
        clock = "cpu" if self.device == "cpu" else "wall"
        speed = ratio({"theirs": theirs.samples, "ours": ours.samples}, "theirs", "ours", clock)
        their_ms = 1e3 * theirs.samples.median_s(clock)
        memory = f"+{theirs.extra_mib:,.0f} MiB against our +{ours.extra_mib:,.0f}"
        equal = "" if self.exact else f"gradients within {apart:.1g} of the largest"
        note = "; ".join(part for part in (f"{version}: {their_ms:.3g} ms, {memory}", equal, pair.note) if part)
        return at_least(pair.name, pair.against, speed, 1, samples=ours.samples, note=note)


def peer_claims(
    pairs: Sequence[Pair], inputs: dict[str, torch.Tensor], against: Sequence[str], device: str, rounds: int
) -> list[Claim]:
    """Compare every pair on `inputs`."""
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers.of(inputs, Path(folder), against, device, rounds)
        return [peers.claim(pair) for pair in pairs]


def check_equal(ours: Path, theirs: Path, tolerance: float, device: str = "cpu") -> float:
    """Return by which share of its largest element loss or a gradient differs at most; stop when that is too much."""
    a, b = (torch.load(path, weights_only=True, map_location=device) for path in (ours, theirs))
    apart = 0.0
    for name, value in a.items():
        other = b[name].float()
        difference = float((value.float() - other).abs().max() / other.abs().max())
        if not difference <= tolerance:
            part = "loss" if name == "loss" else f"gradient {name}"
            raise RuntimeError(f"{ours.stem} and {theirs.stem} differ: {part} by {difference:.2g}, not {tolerance:g}")
        apart = max(apart, difference)
    return apart
