"""How cost grows: sequence length, K, vocabulary, sources, parameters, threads, each with its fitted exponent.

    python bench/scaling.py [--json OUT] [--plot OUT.svg] [--study NAME ...] [--size small]

One quantity varies in a study and the rest stays; a straight line through the logarithms of size and median CPU time
(wall time for threads) gives the exponent: 1 is proportional, 2 is quadratic, 0 is free. Made inputs, seeded; nothing
is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.align import dtw
from fusechat.bench.machine import environment, machine_name
from fusechat.bench.merge_models import llama_config, llama_shapes, write_family
from fusechat.bench.timing import Clock, interleave
from fusechat.bench.train import write_stores
from fusechat.loss.backend import forward_rows
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import check_rows
from fusechat.merge import merge
from fusechat.store import open_topk
from fusechat.train.collate import collate
from fusechat.train.dataset import FusionDataset
from fusechat.train.select import Selection
from fusechat.train.source import open_source

Calls = dict[int, Callable[[], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Median seconds at every size, and the exponent that fits them."""

    name: str
    varies: str
    expected: float
    sizes: list[int]
    seconds: list[float]
    exponent: float


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Return the slope of a least-squares line through log size and log time."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def study(name: str, varies: str, expected: float, calls: Calls, rounds: int, clock: Clock = "cpu") -> Study:
    """Time the calls in turn and fit."""
    samples = interleave({str(size): call for size, call in calls.items()}, rounds)
    sizes = list(calls)
    seconds = [samples[str(size)].median_s(clock) for size in sizes]
    fitted = exponent(sizes, seconds)
    return Study(name=name, varies=varies, expected=expected, sizes=sizes, seconds=seconds, exponent=fitted)


def loss_call(n_rows: int, vocabulary: int, n_entries: int, threads: int = 1) -> Callable[[], object]:
    """Return one forward and backward of the fused loss in place."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(vocabulary, (n_rows,), generator=rng)
    ids = torch.rand(n_rows, vocabulary, generator=rng).topk(n_entries).indices if n_entries else labels[:, None][:, :0]
    logprobs = torch.log_softmax(torch.randn(n_rows, n_entries, generator=rng), 1)
    columns = check_rows(labels, ids, logprobs, 0.9, None, None, None, shape=(n_rows, vocabulary))
    buffer = torch.randn(n_rows, vocabulary, generator=rng)

    def call() -> None:
        torch.set_num_threads(threads)
        forward_rows(buffer, columns, LossOptions(), buffer)

    return call


def dtw_call(n_tokens: int) -> Callable[[], object]:
    """Return the warping of a made text cut in two ways into about `n_tokens` tokens."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 9))) for _ in range(500)]
    pivot = [f"▁{words[i]}" for i in rng.integers(len(words), size=n_tokens)]
    source = [
        part for token in pivot for part in ((f"Ġ{token[1:3]}", token[3:]) if len(token) > 5 else (f"Ġ{token[1:]}",))
    ]
    return lambda: dtw(source, pivot, source_mark="Ġ", pivot_mark="▁")


def merge_call(folder: Path, hidden: int, n_targets: int, threads: int = 1) -> Callable[[], object]:
    """Return an SCE merge of a made family of bf16 Llamas."""
    dims = hidden, 4, 8000, 4 * hidden
    shapes, config = llama_shapes(*dims, tied=True), llama_config(*dims, tied=True)
    models = write_family(folder / f"{hidden}-{n_targets}", shapes, config, n_targets)
    recipe = folder / f"{hidden}-{n_targets}.yml"
    recipe.write_text(
        json.dumps(
            {
                "merge_method": "sce",
                "base_model": str(models[0]),
                "models": [{"model": str(model)} for model in models[1:]],
                "parameters": {"select_topk": 0.1},
                "dtype": "float32",
                "out_dtype": "bfloat16",
            }
        )
    )

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            merge(recipe, Path(out) / "merged", threads=threads)

    return call


def collate_calls(folder: Path, n_sources: Sequence[int], n_dialogues: int, length: int) -> Calls:
    """Return the reading and mixing of a micro-batch that so many sources and the pivot teach together."""
    pivot_path, aligned = write_stores(folder, n_dialogues, length)
    pivot = open_topk(pivot_path)

    def call(n: int) -> Callable[[], object]:
        sources = [open_source(aligned["chain"], pivot, f"source-{i}") for i in range(n)]
        data = FusionDataset(pivot, sources, select=Selection(rule="avg_ce", unit="token"), when_pivot_wins="pivot")
        return lambda: collate([data[i] for i in range(n_dialogues)], pad_token_id=0)

    return {n: call(n) for n in n_sources}


def n_parameters(hidden: int) -> int:
    """Count what `merge_call` makes."""
    return sum(int(np.prod(shape)) for shape in llama_shapes(hidden, 4, 8000, 4 * hidden, tied=True).values())


def studies(folder: Path, small: bool) -> dict[str, Callable[[], Study]]:
    """Return every study by its name."""
    rounds = 3 if small else 7
    lengths = (128, 256, 512) if small else (256, 512, 1024, 2048, 4096)
    vocabularies = (4_000, 16_000) if small else (16_000, 32_000, 64_000, 128_000, 256_000)
    hidden = (64, 128) if small else (128, 256, 512, 1024)
    targets = (2, 4) if small else (2, 3, 4, 6, 8)
    sources, length = ((1, 2), 128) if small else ((1, 2, 4, 6), 1024)
    cores = (1, 2)
    n_rows, vocabulary = (32, 8_000) if small else (256, 32_000)
    return {
        "dtw": lambda: study("dtw alignment", "tokens", 2, {n: dtw_call(n) for n in lengths}, rounds),
        "loss-rows": lambda: study(
            "fused loss",
            "rows",
            1,
            {n: loss_call(n, vocabulary, 10) for n in (n_rows // 2, n_rows, 2 * n_rows)},
            rounds,
        ),
        "loss-K": lambda: study(
            "fused loss", "K", 0, {k: loss_call(n_rows, vocabulary, k) for k in (1, 8, 32, 128)}, rounds
        ),
        "loss-V": lambda: study("fused loss", "vocabulary", 1, {v: loss_call(64, v, 10) for v in vocabularies}, rounds),
        "loss-threads": lambda: study(
            "fused loss", "threads", -1, {t: loss_call(n_rows, vocabulary, 10, t) for t in cores}, rounds, "wall"
        ),
        "collate-sources": lambda: study(
            "multi collate", "sources", 1, collate_calls(folder / "stores", sources, 4, length), rounds
        ),
        "merge-targets": lambda: study(
            "sce merge", "targets", 1, {n: merge_call(folder, hidden[-1] // 2, n) for n in targets}, rounds
        ),
        "merge-parameters": lambda: study(
            "sce merge", "parameters", 1, {n_parameters(h): merge_call(folder, h, 2) for h in hidden}, rounds
        ),
        "merge-threads": lambda: study(
            "sce merge", "threads", -1, {t: merge_call(folder, hidden[-1], 2, t) for t in cores}, rounds, "wall"
        ),
    }


def plot(found: list[Study], title: str, out: Path) -> None:
    """Draw one panel a study, with the fitted line and the expected one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.8 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, one in zip(axes.flat, found):
        milliseconds = 1e3 * np.array(one.seconds)
        axis.loglog(one.sizes, milliseconds, "o", color="#0072b2")
        for slope, style, label in ((one.exponent, "-", "exponent"), (one.expected, ":", "expected")):
            line = np.exp(np.log(milliseconds).mean() + slope * (np.log(one.sizes) - np.log(one.sizes).mean()))
            axis.loglog(one.sizes, line, style, color="#d55e00", label=f"{label} {slope:.2f}".removesuffix(".00"))
        axis.set(title=one.name, xlabel=one.varies, ylabel="ms")
        axis.set_xticks(one.sizes, [_short(size) for size in one.sizes])
        axis.set_ylim(milliseconds.min() / 3, milliseconds.max() * 4)
        ticks = [milliseconds.min(), milliseconds.max()]
        axis.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _short(size: int) -> str:
    return f"{size / 1e6:.0f}M" if size >= 1e6 else f"{size / 1e3:.0f}k" if size >= 1000 else str(size)


def main() -> int:
    """Run the studies, print the exponents, write JSON and plot if asked."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    options.add_argument("--plot", type=Path, help="an .svg or .png")
    options.add_argument("--study", action="append", help="only these; all when absent")
    options.add_argument("--size", choices=["small", "paper"], default="paper")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        known = studies(Path(temporary), chosen.size == "small")
        for name in chosen.study or known:
            if name not in known:
                options.error(f"no study {name!r}; there are: {', '.join(known)}")
            found.append(known[name]())
            one = found[-1]
            print(f"{one.name:<14} with {one.varies:<11} exponent {one.exponent:5.2f}  expected {one.expected:g}")
    result: dict[str, Any] = {"environment": environment(), "studies": [asdict(one) for one in found]}
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    if chosen.plot:
        plot(found, f"{machine_name(result['environment'])}, {result['environment']['date']}", chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
