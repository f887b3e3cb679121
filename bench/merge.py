"""What the merge costs, against mergekit on the same files and against the disk.

    fusechat bench merge [--size small|paper] [--against mergekit=PYTHON] [--json OUT] [--check]
    python bench/merge.py … [--dir DIR] [--only CASE ...]

Equality with mergekit comes first, then CPU-seconds of whole processes with one compute thread, in turn, medians.
`paper` is what the claims are about (0.47, 0.12 and 0.22 billion parameters, six models of each: 9.7 GB of disk).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusechat.bench.claims import Claim, absent, at_least, at_most
from fusechat.bench.merge_models import llama_config, llama_shapes, write_family
from fusechat.bench.merge_peers import Cost, fusechat_merge, io_floor, mergekit, mergekit_command
from fusechat.bench.report import parser, report
from fusechat.bench.timing import spread
from fusechat.checkpoint import open_checkpoint, read_tensor

# hidden, layers, vocabulary, intermediate, tied
FAMILIES = {
    "small": {
        "plain": (256, 4, 8000, 1024, False),
        "light": (256, 2, 8000, 1024, False),
        "wide": (256, 2, 30000, 1024, True),
    },
    "paper": {
        "plain": (1024, 24, 32000, 4096, False),
        "light": (1024, 3, 32000, 4096, False),
        "wide": (1024, 4, 152064, 4096, True),
    },
}
PARAMETERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sce 0.1": ("sce", {"select_topk": 0.1}, {}),
    "sce 1.0": ("sce", {"select_topk": 1.0}, {}),
    "ties 0.6": ("ties", {}, {"weight": 0.2, "density": 0.6}),
    "dare_ties 0.6": ("dare_ties", {}, {"weight": 0.2, "density": 0.6}),
    "linear": ("linear", {}, {"weight": 0.2}),
    "task_arithmetic": ("task_arithmetic", {}, {"weight": 0.2}),
}
# The family and the ratio to reach; linear merges are claimed under 0.2 billion parameters, where start-up counts most.
# The others are measured there, too, for with the larger family mergekit takes minutes each.
CLAIMS = {
    "sce 0.1": ("plain", 20.0),
    "sce 1.0": ("light", 4.0),
    "ties 0.6": ("light", 20.0),
    "dare_ties 0.6": ("light", 4.0),
    "linear": ("light", 10.0),
    "task_arithmetic": ("light", 10.0),
}
PARTS = ("wide embedding", "memory", "threads", "floor")  # what else is said of sce at 0.1
PEER = "mergekit 0.1.5"


def recipes(folder: Path, models: list[Path], case: str) -> tuple[Path, Path]:
    """Write one merge for us and one for mergekit; they differ in sce's variant, which mergekit does not know."""
    method, shared, own = PARAMETERS[case]
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": own} if own else {"model": str(model)} for model in models[1:]],
        "parameters": shared,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = str(models[0])
    theirs = folder / f"{case}.mergekit.yml"
    theirs.write_text(yaml.safe_dump(config))
    if method == "sce":
        config["parameters"] = shared | {"variant": "mergekit"}
    ours = folder / f"{case}.yml"
    ours.write_text(yaml.safe_dump(config))
    return ours, theirs


def differing_share(ours: Path, theirs: Path) -> float:
    """Return the share of elements in which two merged models differ."""
    a, b = open_checkpoint(ours).tensors, open_checkpoint(theirs).tensors
    differ = sum(int((read_tensor(a[name]) != read_tensor(b[name])).sum()) for name in a)
    return differ / sum(entry.n_elements for entry in a.values())


def measured(folder: Path, models: list[Path], case: str, repeats: int, peer: Path | None) -> list[Claim]:
    """Merge with both tools in turn; returns the claims of CPU-seconds and, for methods without chance, of equality."""
    ours_recipe, theirs_recipe = recipes(folder, models, case)
    ours: list[Cost] = []
    theirs: list[Cost] = []
    claims: list[Claim] = []
    for _ in range(repeats):
        for out in (folder / "ours", folder / "theirs"):
            shutil.rmtree(out, ignore_errors=True)
        ours.append(fusechat_merge(ours_recipe, folder / "ours"))
        if peer is None:
            continue
        theirs.append(mergekit(peer, theirs_recipe, folder / "theirs"))
        if not claims and "dare" not in case:
            # Exact halves and ties abound among bf16 numbers: mergekit's fp32 sums fall to either side of a half, and
            # its sort takes any of the tied. tests/test_merge_peer.py compares the others on inputs without ties.
            share = differing_share(folder / "ours", folder / "theirs")
            limit = 1e-4 if case.startswith("sce") else None
            claims.append(at_most(f"{case}, share of elements that differ", PEER, share, limit, ""))
    reach = 25.0 if folder.name == "wide" else CLAIMS[case][1]
    name = f"{case}, wide embedding" if folder.name == "wide" else case
    peak_mib = max(cost.rss_bytes for cost in ours) / 2**20
    if peer is None:
        claims.append(absent(name, PEER, f"≥ {reach:g}", "not installed: --against mergekit=PYTHON"))
    else:
        ratios = spread([b.cpu_s / a.cpu_s for a, b in zip(ours, theirs, strict=True)])
        seconds = [statistics.median(cost.cpu_s for cost in costs) for costs in (ours, theirs)]
        peer_mib = max(cost.rss_bytes for cost in theirs) / 2**20
        note = f"{seconds[0]:.2f} CPU-s against {seconds[1]:.1f}, its peak {peer_mib:,.0f} MiB"
        claims.append(at_least(name, PEER, ratios, reach, note=note, peak_mib=peak_mib))
    if case == "sce 0.1":
        claims.append(at_most(f"{name}, peak RSS", "absolute", peak_mib, 60 if folder.name == "wide" else 100, "MiB"))
    return claims


def floor_claim(folder: Path, models: list[Path]) -> Claim:
    """Compare CPU-seconds with those of reading every input once and writing the output once."""
    recipe, _ = recipes(folder, models, "sce 0.1")
    inputs = [model / "model.safetensors" for model in models]
    ratios = []
    for _ in range(3):
        shutil.rmtree(folder / "ours", ignore_errors=True)
        ours = fusechat_merge(recipe, folder / "ours")
        floor = io_floor(inputs, folder / "floor", inputs[0].stat().st_size)
        (folder / "floor").unlink()
        ratios.append(ours.cpu_s / floor.cpu_s)
    return at_most("sce 0.1, from the I/O floor", "reading once, writing once", spread(ratios), 4)


def memory_claim(folder: Path, size: str) -> Claim:
    """Merge one small and one large tensor; compares the peak resident sets."""
    peaks = []
    for n in (1 << 22, (1 << 28) if size == "paper" else (1 << 25)):
        place = folder / f"one{n}"
        models = write_family(place, {"w.weight": (n // 1024, 1024)}, {"model_type": "llama", "vocab_size": 7}, 2)
        ours, _ = recipes(place, models, "sce 0.1")
        shutil.rmtree(place / "out", ignore_errors=True)
        peaks.append(fusechat_merge(ours, place / "out").rss_bytes / 2**20)
        shutil.rmtree(place / "out")
    n_large = "256M" if size == "paper" else "32M"
    return at_most(f"sce 0.1, RSS of one tensor of {n_large}", "of 4M elements", peaks[1] - peaks[0], 5, "MiB")


def threads_claim(folder: Path, models: list[Path], repeats: int) -> Claim:
    """Compare the wall time of one thread with that of two, files warm."""
    ours, _ = recipes(folder, models, "sce 0.1")
    ratios = []
    for _ in range(repeats):
        walls = []
        for threads in (1, 2):
            shutil.rmtree(folder / "ours", ignore_errors=True)
            walls.append(fusechat_merge(ours, folder / "ours", threads).wall_s)
        ratios.append(walls[0] / walls[1])
    return at_least("sce 0.1, two threads", "one thread", spread(ratios), 1.6, note="wall clock, files warm")


def main() -> int:
    """Measure everything and report."""
    options = parser(__doc__ or "")
    options.add_argument("--dir", type=Path, help="keep the models here for the next time")
    options.add_argument("--only", action="append", choices=[*CLAIMS, *PARTS], help="these cases; repeatable")
    options.add_argument("--repeats", type=int, default=1)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return report("merge", run(chosen, chosen.dir or Path(temporary)), chosen, disk=True)


def run(options: argparse.Namespace, folder: Path) -> list[Claim]:
    """Make the families that are needed and measure what was asked for."""
    cases = options.only or [*CLAIMS, *PARTS]
    peer = mergekit_command(options.against)
    families: dict[str, list[Path]] = {}

    def family(name: str) -> tuple[Path, list[Path]]:
        place = folder / options.size / name
        if name not in families:
            *dims, tied = FAMILIES[options.size][name]
            shapes, config = llama_shapes(*dims, tied=tied), llama_config(*dims, tied=tied)
            families[name] = write_family(place, shapes, config, 5)
            n = sum(int(np.prod(shape)) for shape in shapes.values())
            print(f"{name}: {n / 1e6:.0f} million parameters, base + 5, bf16", flush=True)
        return place, families[name]

    claims: list[Claim] = []
    for case in (case for case in CLAIMS if case in cases):
        claims += measured(*family(CLAIMS[case][0]), case, options.repeats, peer)
    if "wide embedding" in cases:
        claims += measured(*family("wide"), "sce 0.1", options.repeats, peer)
    if "memory" in cases:
        claims.append(memory_claim(folder, options.size))
    if "threads" in cases:
        claims.append(threads_claim(*family("plain"), max(3, options.repeats)))
    if "floor" in cases:
        claims.append(floor_claim(*family("plain")))
    return claims


if __name__ == "__main__":
    sys.exit(main())
