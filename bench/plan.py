"""The plan against what the stages take: peak memory of extraction, training and merge, two model sizes, on the CPU.

    fusechat bench plan [--size small|paper] [--json OUT] [--check]
    python bench/plan.py …

Makes the models, asks `fusechat.plan`, then runs every stage in a process of its own and reads its largest resident
size (VmHWM). The prediction includes the interpreter and its libraries, which the plan measures by itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusechat.bench.claims import Claim, at_most
from fusechat.bench.plan_world import SIZES, write_world
from fusechat.bench.report import parser, report
from fusechat.config import SourceConfig, load_config
from fusechat.plan import plan
from fusechat.plan.hardware import this_computer

TOLERANCE = 0.15
STAGES = ("extract pivot", "extract source", "align source", "train source", "merge")
CHOICES = {"small": list(SIZES)[:1], "paper": list(SIZES)}


def measure(size: str, folder: Path) -> list[dict[str, Any]]:
    """Return predicted and measured bytes of every stage of one size."""
    path = write_world(folder / size, size)
    config = load_config(path)
    five = [{"model": config.sources[0].model, "name": name} for name in ("source", "b", "c", "d", "e")]
    planned = plan(config.model_copy(update={"sources": [SourceConfig(**s) for s in five]}), this_computer())
    stages = {f"{s.stage} {s.name}".removesuffix(" sce"): s for s in planned.stages}
    found = []
    for what in STAGES:
        command = [sys.executable, "-m", "fusechat.bench.plan_stage", what, str(path)]
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
        error = abs(predicted / measured - 1)
        claim = at_most(
            f"plan: {entry['stage']}, {entry['size']}",
            "peak resident size",
            error,
            TOLERANCE,
            "relative error",
            note=f"predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB; beyond the process "
            f"{(predicted - entry['predicted']['process']) / 1e6:.0f} and {above / 1e6:.0f}; MB: {parts}",
        )
        out.append(claim)
    return out


def main() -> int:
    """Measure everything and report."""
    arguments = parser(__doc__ or "", presets=tuple(CHOICES)).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = [entry for size in CHOICES[arguments.size] for entry in measure(size, Path(temporary))]
    return report("plan", claims(found), arguments)


if __name__ == "__main__":
    sys.exit(main())
