"""The plan against what the stages take: peak memory of extraction, training and merge, two model sizes, on the CPU.

    python bench/plan.py [--json OUT] [--check] [--size 22M,89M]

Makes the models, asks `fusechat.plan`, then runs every stage in a process of its own and reads its largest resident
size (VmHWM). The prediction includes the interpreter and its libraries, which the plan measures by itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusechat.bench.claims import Claim, at_most
from fusechat.bench.plan_world import SIZES, write_world
from fusechat.bench.report import parser, report
from fusechat.bench.timing import peak_rss_mib
from fusechat.config import RunConfig, SourceConfig, load_config
from fusechat.plan import plan
from fusechat.plan.hardware import this_computer
from fusechat.run import Layout, merge_recipe

TOLERANCE = 0.15
STAGES = ("extract pivot", "extract source", "align source", "train source", "merge")


def run_stage(config: RunConfig, what: str) -> None:
    """Run one stage as `fusechat run` does."""
    layout = Layout(out=Path(config.out))
    stage, _, name = what.partition(" ")
    if stage == "extract":
        from fusechat.dialogue import load_dialogues, split_held_out
        from fusechat.extract import extract

        dialogues, _ = split_held_out(load_dialogues(config.data.train), config.data.held_out_fraction, config.seed)
        options = config.extract.model_dump(include={"top_k", "max_length_tokens", "batch_tokens"})
        model = config.pivot if name == "pivot" else config.sources[0].model
        extract(model, dialogues, layout.store(name), **options)
    elif stage == "align":
        from fusechat.align import align

        align(layout.store("pivot"), layout.store(name), layout.aligned(name), **config.align.model_dump())
    elif stage == "train":
        from fusechat.train import train

        train(config.pivot, layout.store("pivot"), layout.aligned(name), layout.target(name), config.train)
    else:
        from fusechat.merge import merge

        # Five targets, as in the paper: the one that was trained under five names.
        names = ["source", *(f"again{i}" for i in range(4))]
        for name in names[1:]:
            layout.target(name).symlink_to(layout.target("source"))
        merge(merge_recipe(config, layout, names), layout.merged)


def measure(size: str, folder: Path) -> list[dict[str, Any]]:
    """Return predicted and measured bytes of every stage of one size."""
    path = write_world(folder / size, size)
    config = load_config(path)
    five = [{"model": config.sources[0].model, "name": name} for name in ("source", "b", "c", "d", "e")]
    planned = plan(config.model_copy(update={"sources": [SourceConfig(**s) for s in five]}), this_computer())
    stages = {f"{s.stage} {s.name}".removesuffix(" sce"): s for s in planned.stages}
    found = []
    for what in STAGES:
        command = [sys.executable, "-m", "fusechat.bench.plan", "--stage", what, "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{what} of {size} failed: {done.stderr[-800:]}")
        measured = int(done.stdout.split()[-1])
        parts = stages[what].host_parts
        found.append({"size": size, "stage": what, "measured_bytes": measured, "predicted": dict(parts)})
    return found


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """Return a claim per stage and size: how far the prediction is off, of the measured peak."""
    out = []
    for entry in found:
        measured, predicted = entry["measured_bytes"], sum(entry["predicted"].values())
        above = measured - entry["predicted"]["process"]
        parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in entry["predicted"].items())
        asked = "align" not in entry["stage"]
        error = abs(predicted / measured - 1)
        claim = at_most(
            f"plan: {entry['stage']}, {entry['size']}",
            "peak resident size",
            error,
            TOLERANCE if asked else None,
            "relative error",
            note=f"predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB; beyond the process "
            f"{(predicted - entry['predicted']['process']) / 1e6:.0f} and {above / 1e6:.0f}; MB: {parts}",
        )
        out.append(claim)
    return out


def main() -> int:
    """Run the benchmark, or one stage of it."""
    options = parser(__doc__ or "")
    options.add_argument("--stage", help="run this stage alone and print its peak")
    options.add_argument("--config", type=Path)
    arguments = options.parse_args()
    if arguments.stage:
        run_stage(load_config(arguments.config), arguments.stage)
        print(int(peak_rss_mib() * 2**20))
        return 0
    chosen = [size for size in SIZES if size in arguments.size.split(",")] or list(SIZES)
    with tempfile.TemporaryDirectory() as temporary:
        found = [entry for size in chosen for entry in measure(size, Path(temporary))]
    return report("plan", claims(found), arguments)


if __name__ == "__main__":
    sys.exit(main())
