"""The loss kernels on a GPU: fractions of the copy and GEMM ceilings measured in the same run, beside the peers.

    python bench/loss_gpu.py [--json OUT] [--check] [--against liger-kernel=VENV/bin/python]

`--device cpu --rows 32 --width 16 --vocabularies 300` runs the same code small, to see that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fusechat.bench.baselines import gather_loss
from fusechat.bench.claims import Claim, absent, at_most
from fusechat.bench.loss_peers import LINEAR, LOGITS, Pair, Peers
from fusechat.bench.report import parser, report, result_of, write_json
from fusechat.loss import linear_sparse_soft_ce, sparse_soft_ce

K, HARD_WEIGHT = 10, 0.9
L2_BYTES_DEFAULT = 32 << 20
EXTRA_BYTES_LIMIT = 2 << 30
Rows = tuple[torch.Tensor, ...]
Part = Callable[[], list[Claim]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The sizes of a run."""

    device: str
    n_rows: int
    width: int
    vocabularies: tuple[int, ...]
    rounds: int

    def measure(self, calls: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
        """Return each call's median milliseconds, interleaved with the others, and the MiB it adds at its peak."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        memory: dict[str, float] = {}
        for name, call in calls.items():
            call()
            memory[name] = self._extra_mib(call)
        for _ in range(self.rounds):
            for name, call in calls.items():
                times[name].append(self._time_ms(call))
        return {name: (statistics.median(times[name]), memory[name]) for name in calls}

    def _time_ms(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event)

    def _extra_mib(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":
            return float("nan")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def make_rows(bench: Bench, vocabulary: int, masked: float = 0.0) -> Rows:
    """Return labels, ids and log-probabilities; a share of the labels is ignored."""
    rng = torch.Generator().manual_seed(0)
    part = vocabulary // K
    labels = torch.randint(vocabulary, (bench.n_rows,), generator=rng)
    labels[torch.rand(bench.n_rows, generator=rng) < masked] = -100
    ids = torch.randint(part, (bench.n_rows, K), generator=rng) + torch.arange(K) * part
    logprobs = torch.log_softmax(torch.randn(bench.n_rows, K, generator=rng), 1)
    return tuple(tensor.to(bench.device) for tensor in (labels, ids, logprobs))


def check_equal(bench: Bench, vocabulary: int) -> None:
    """Stop when loss or any element of the gradient differs from autograd's in fp64."""
    rows = make_rows(bench, vocabulary)
    rows = tuple(tensor[:32] for tensor in rows)
    exact = torch.randn(rows[0].shape[0], vocabulary, device=bench.device).double().requires_grad_(True)
    reference = gather_loss(exact, rows[0], rows[1], rows[2].double(), HARD_WEIGHT)
    reference.backward()
    ours = exact.detach().float().requires_grad_(True)
    out = sparse_soft_ce(ours * 1, *rows, hard_weight=HARD_WEIGHT)
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)
    # Beside the targets, where nothing cancels, every element to its own digits.
    for gradient in (ours.grad, exact.grad):
        gradient.scatter_(1, torch.cat([rows[0].unsqueeze(1), rows[1]], 1), 0.0)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=0)


def copy_bytes_per_ms(bench: Bench) -> float:
    """Return the bytes read and written in a millisecond by a copy of logits of the largest vocabulary."""
    source = torch.zeros(bench.n_rows, max(bench.vocabularies), dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    time_ms, _ = bench.measure({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / time_ms


def logits_claims(bench: Bench, vocabulary: int, ceiling: float) -> list[Claim]:
    """Compare the kernel on bf16 logits with one read and one write at the copy's speed, and with torch's losses."""
    check_equal(bench, vocabulary)
    rows = make_rows(bench, vocabulary)
    logits = torch.randn(bench.n_rows, vocabulary, device=bench.device, dtype=torch.bfloat16)
    buffer = logits.clone()

    def ours() -> None:
        sparse_soft_ce(buffer.detach().requires_grad_(True), *rows, hard_weight=HARD_WEIGHT).loss.backward()

    def cross_entropy(z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z.float(), rows[0])

    def backward_of(loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        return lambda: loss(logits.detach().requires_grad_(True)).backward()  # type: ignore[no-untyped-call]

    calls: dict[str, Callable[[], object]] = {"ours": ours, "F.cross_entropy": backward_of(cross_entropy)}
    if bench.device != "cpu":
        # One code a size: the next one's would else be compiled for any, which is slower.
        calls["torch.compile of F.cross_entropy"] = backward_of(torch.compile(cross_entropy, dynamic=False))
    found = bench.measure(calls)
    floor_ms = 2 * logits.nbytes / ceiling
    limit = 1.15 if in_flight_bytes(vocabulary) < l2_bytes() / 2 else 1.6
    time_ms, memory_mib = found.pop("ours")
    note = f"{time_ms:.3f} ms, floor {floor_ms:.3f}, +{memory_mib:.0f} MiB"
    name = f"logits kernel, V={vocabulary}"
    return [
        at_most(name, "one read and one write", time_ms / floor_ms, limit, note=note),
        *(
            at_most(name, peer, time_ms / other_ms, 1.0, note=f"{other_ms:.3f} ms, +{other_mib:.0f} MiB")
            for peer, (other_ms, other_mib) in found.items()
        ),
    ]


def in_flight_bytes(vocabulary: int) -> int:
    """Return the bytes of the rows that the processors of a GPU hold at a time, one program each."""
    count = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1
    return count * vocabulary * 2


def l2_bytes() -> int:
    """Return the size of the L2 cache."""
    if not torch.cuda.is_available():
        return L2_BYTES_DEFAULT
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", L2_BYTES_DEFAULT))


def peer_parts(bench: Bench, vocabulary: int, against: Sequence[str], folder: Path) -> dict[str, Part]:
    """Compare with other packages on one vocabulary's inputs, every package in a process of its own: a part a pair."""

    def random(*shape: int, over: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=bench.device) / over).bfloat16()

    def claim(pair: Pair, kind: str, inputs: Callable[[], dict[str, torch.Tensor]]) -> list[Claim]:
        if kind not in written:
            (folder / kind).mkdir()
            rows = dict(zip(("labels", "ids", "logprobs"), make_rows(bench, vocabulary)))
            written[kind] = Peers.of(rows | inputs(), folder / kind, against, bench.device, bench.rounds)
            torch.cuda.empty_cache()  # theirs have to fit beside this process
        return [written[kind].claim(pair)]

    def states() -> dict[str, torch.Tensor]:
        weight = random(vocabulary, bench.width, over=bench.width**0.5)
        return {"hidden": random(bench.n_rows, bench.width), "weight": weight}

    def logits() -> dict[str, torch.Tensor]:
        return {"logits": random(bench.n_rows, vocabulary)}

    written: dict[str, Peers] = {}
    parts: dict[str, Part] = {}
    for kind, pairs, inputs in (("linear", LINEAR, states), ("logits", LOGITS, logits)):
        for pair in pairs:
            parts[f"{pair.name}, against {pair.against}"] = partial(claim, pair, kind, inputs)
    return parts


def linear_claims(bench: Bench, vocabulary: int, masked: float) -> list[Claim]:
    """Compare the linear form with its three products, measured."""
    rows = make_rows(bench, vocabulary, masked)
    dtype = torch.bfloat16
    hidden = torch.randn(bench.n_rows, bench.width, device=bench.device, dtype=dtype).requires_grad_(True)
    weight = (
        (torch.randn(vocabulary, bench.width, device=bench.device) / bench.width**0.5).to(dtype).requires_grad_(True)
    )
    kept = (rows[0] != -100).nonzero().squeeze(1)
    h, w = hidden.detach()[kept], weight.detach()
    logits = torch.empty(len(kept), vocabulary, device=bench.device, dtype=dtype)

    def finish(loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        hidden.grad = weight.grad = None

    def ours() -> None:
        finish(linear_sparse_soft_ce(hidden, weight, *rows, hard_weight=HARD_WEIGHT, kept=kept).loss)

    def products() -> None:
        torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w)
        torch.mm(logits.t(), h)

    calls: dict[str, Callable[[], object]] = {"ours": ours, "products": products}
    found = bench.measure(calls)
    (time_ms, memory_mib), (floor_ms, _) = found["ours"], found["products"]
    # Gradients are results, the rest is what the loss itself takes.
    extra_mib = memory_mib - (hidden.nbytes + weight.nbytes) / 2**20
    teraflops = 6 * len(kept) * vocabulary * bench.width / floor_ms / 1e9
    note = f"{time_ms:.2f} ms, products {floor_ms:.2f} ({teraflops:.0f} TFLOP/s)"
    name = f"linear form, V={vocabulary}, {masked:.0%} masked"
    claims = [at_most(name, "its three products", time_ms / floor_ms, 1.07, note=note)]
    if bench.device != "cpu":
        claims.append(at_most(f"{name}, extra memory", "the budget", extra_mib, EXTRA_BYTES_LIMIT / 2**20, "MiB"))
    return claims


def read_sizes(options: argparse.Namespace) -> Bench:
    """Return the sizes asked for."""
    return Bench(
        device=options.device,
        n_rows=options.rows,
        width=options.width,
        vocabularies=tuple(options.vocabularies),
        rounds=options.rounds,
    )


def main() -> int:
    """Measure everything and report; without a GPU say that nothing was measured."""
    options = parser(__doc__ or "", devices=("cuda", "cpu"), presets=("paper",))
    options.add_argument("--rows", type=int, default=8192)
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256, 151_665, 152_064])
    options.add_argument("--rounds", type=int, default=10)
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        missing = absent("loss kernels", "copy, GEMM and peers", "≤ 1.15", "no CUDA device here")
        return report("loss", [missing], chosen)
    bench = read_sizes(chosen)
    torch.manual_seed(0)
    ceiling = copy_bytes_per_ms(bench)
    print(f"copy: {ceiling / 1e6:.0f} GB/s")
    parts: dict[str, Part] = {}
    for vocabulary in bench.vocabularies:
        parts[f"logits kernel, V={vocabulary}"] = lambda v=vocabulary: logits_claims(bench, v, ceiling)
        for masked in (0.0, 0.3, 0.6):
            parts[f"linear form, V={vocabulary}, {masked:.0%} masked"] = lambda v=vocabulary, m=masked: linear_claims(
                bench, v, m
            )
    with tempfile.TemporaryDirectory() as folder:
        # The largest vocabulary is where a peer's way of saving memory shows.
        parts |= peer_parts(bench, max(bench.vocabularies), chosen.against, Path(folder))
        claims, failed = measured_parts(parts, chosen)
    return max(report("loss", claims, chosen), failed)


def measured_parts(parts: dict[str, Part], chosen: argparse.Namespace) -> tuple[list[Claim], int]:
    """Return the claims of all parts and whether one failed; what there is so far is in the JSON after each of them."""
    claims: list[Claim] = []
    failed = 0
    began = time.monotonic()
    for name, part in parts.items():
        print(f"{time.monotonic() - began:.0f} s: {name}", flush=True)
        try:
            claims += part()
        except Exception as error:  # one part's mistake must not lose the others' figures on a machine lent for minutes
            failed = 1
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            print(f"{name} failed: {why}", file=sys.stderr)
            claims.append(absent(name, "", "", why))
        if chosen.json:
            write_json(result_of("loss", claims, chosen.device), chosen.json)
    return claims, failed


if __name__ == "__main__":
    sys.exit(main())
