"""The paper's own fusion at its full size, by stage, on several machines: the plan of its recipe, added up.

    python -m fusechat.plan.projection

The authors report about 7 hours a target on 8 × A100-40GB (arXiv 2402.16107, §4.1). Alignment and merging go by rates
measured on the CPU; extraction and training by counted FLOPs and an assumed share of the GPU's peak, given as a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusechat.config import RunConfig, load_config
from fusechat.plan import Plan, plan
from fusechat.plan.hardware import Hardware, load_hardware

AUTHORS_HOURS = 7.0
AUTHORS_PADDED_TOKENS = 2048  # their collator pads every dialogue to the longest length
MACHINES = (("a100-40", 8), ("h200", 8), ("h200", 1))
EXTRACT_EFFICIENCY = (0.4, 0.6)
TRAIN_EFFICIENCY = (0.3, 0.5)
STAGES = ("extract", "align", "train", "merge")


def papers_config() -> RunConfig:
    """Return the paper's recipe, with leave to run the code that one of its sources brings."""
    return load_config("recipe:fusechat_7b_v2", ["extract.trust_remote_code=true"])


def hours(result: Plan, stage: str) -> float:
    """Return the hours of all lines of a stage."""
    return sum(s.seconds for s in result.stages if s.stage == stage) / 3600


def plans(config: RunConfig, hardware: Hardware) -> tuple[Plan, Plan]:
    """Return the plan at the lower and at the upper efficiencies."""
    low, high = (
        plan(config, replace(hardware, efficiency={"extract": extract, "train": train}))
        for extract, train in zip(EXTRACT_EFFICIENCY, TRAIN_EFFICIENCY)
    )
    return low, high


def authors_utilisation(config: RunConfig) -> tuple[float, float]:
    """Return the share of 8 A100s' peak that 7 hours a target mean: on real tokens, and on tokens padded to 2,048.

    Both without what gradient checkpointing repeats.
    """
    hardware = load_hardware("a100-40", gpus=8)
    train = next(s for s in plan(config, hardware).stages if s.stage == "train")
    share = train.flops / (AUTHORS_HOURS * 3600 * 8 * hardware.flops["bfloat16"])
    real = float(str(train.settings["tokens_per_dialogue"]))
    return share, share * AUTHORS_PADDED_TOKENS / real


def markdown(machines: Sequence[tuple[str, int]] = MACHINES) -> str:
    """Return the projection as a Markdown table, hours from the higher to the lower efficiency."""
    config = papers_config()
    columns = [plans(config, load_hardware(name, gpus=gpus)) for name, gpus in machines]
    lines = [
        "| hours | " + " | ".join(f"{gpus} × {name}" for name, gpus in machines) + " |",
        "|---|" + "---|" * len(machines),
    ]
    for stage in STAGES:
        cells = [_range(hours(high, stage), hours(low, stage)) for low, high in columns]
        lines.append(f"| {stage}, {_count(columns[0][0], stage)} | {' | '.join(cells)} |")
    one = [
        [next(s for s in p.stages if s.stage == "train").seconds / 3600 for p in (high, low)] for low, high in columns
    ]
    lines.append("| of it one target | " + " | ".join(_range(*pair) for pair in one) + " |")
    fits = ["yes" if all(s.fits for s in low.stages if s.stage in STAGES) else _unfit(low) for low, _ in columns]
    lines.append("| fits | " + " | ".join(fits) + " |")
    return "\n".join(lines)


def _range(fast: float, slow: float) -> str:
    return f"{fast:.2g}" if slow - fast < 0.05 * slow else f"{fast:.2g} – {slow:.2g}"


def _count(result: Plan, stage: str) -> str:
    n = sum(s.stage == stage for s in result.stages)
    return {"extract": f"{n} models", "align": f"{n} sources", "train": f"{n} trainings"}.get(stage, "5 targets")


def _unfit(result: Plan) -> str:
    return "not " + ", ".join(f"{s.stage} {s.name}" for s in result.stages if s.stage in STAGES and not s.fits)


if __name__ == "__main__":
    print(markdown())
    real, padded = authors_utilisation(papers_config())
    print(f"\n7 h a target: {real:.0%} of the peak on real tokens, {padded:.0%} on padded ones")
