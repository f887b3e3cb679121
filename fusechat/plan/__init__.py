"""What a fusion will need, before it is paid for: per stage and source memory, disk, work and time.

Nothing here reads a weight: configs, safetensors headers, and the dialogues' lengths are enough.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fusechat.artifact import Json
from fusechat.callable_module import make_callable
from fusechat.config import RunConfig, source_name
from fusechat.plan.extraction import plan_extraction
from fusechat.plan.hardware import Hardware
from fusechat.plan.host_stages import plan_alignment, plan_evaluation, plan_merge
from fusechat.plan.model_shape import ModelShape
from fusechat.plan.models import model_shape
from fusechat.plan.process import GPU_PROCESS_BYTES, process_bytes
from fusechat.plan.stage import StagePlan
from fusechat.plan.training import plan_training
from fusechat.plan.workload import Lengths, find_workload, lengths

__all__ = ["Plan", "plan"]
make_callable(__name__)

SFT, MULTI = "sft", "multi"
_GPU_HOST_THREADS = 16
_GPU_HOST_BYTES = {"extract": GPU_PROCESS_BYTES, "train": GPU_PROCESS_BYTES, "align": 250_000_000, "merge": 40_000_000}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All stages of a run; `strategies` is a GPU's bytes in training under every way to spread the state."""

    hardware: Hardware
    stages: tuple[StagePlan, ...]
    strategies: dict[str, int]
    disk_limit_bytes: int | None
    assumptions: tuple[str, ...]

    @property
    def disk_bytes(self) -> int:
        """The most the run needs on the disk: what everything leaves, and one stage's checkpoints."""
        return sum(s.disk_bytes for s in self.stages) + max(s.temporary_disk_bytes for s in self.stages)

    @property
    def disk_fits(self) -> bool:
        """Whether the disk holds it, as far as it is known."""
        return self.disk_limit_bytes is None or self.disk_bytes <= self.disk_limit_bytes

    @property
    def fits(self) -> bool:
        """Whether every stage fits device, host and disk."""
        return self.disk_fits and all(stage.fits for stage in self.stages)

    def as_json(self) -> Json:
        """Return the plan's JSON form."""
        return {
            "hardware": self.hardware.name,
            "devices": self.hardware.devices,
            "device_memory_bytes": self.hardware.memory_bytes,
            "stages": [stage.as_json() for stage in self.stages],
            "train_strategies_bytes": self.strategies,
            "disk_bytes": self.disk_bytes,
            "disk_limit_bytes": self.disk_limit_bytes,
            "fits": self.fits,
            "flops": sum(stage.flops for stage in self.stages),
            "seconds": sum(stage.seconds for stage in self.stages),
            "assumptions": list(self.assumptions),
        }


def plan(
    config: RunConfig,
    hardware: Hardware,
    *,
    dialogues: int | None = None,
    tokens_per_dialogue: int | None = None,
    disk_limit_bytes: int | None = None,
) -> Plan:
    """Return what every stage of a run takes on the hardware.

    Raises DataError for a model of which nothing is known, FormatError for an unreadable header, ConfigError for a data
    set of which nothing is known.
    """
    workload = find_workload(config.data, config.seed, dialogues, tokens_per_dialogue)
    names = [source_name(source) for source in config.sources]
    models: dict[str, tuple[ModelShape, Lengths]] = {}
    assumptions = list(workload.assumptions)
    for name, model in {"pivot": config.pivot, **dict(zip(names, (s.model for s in config.sources)))}.items():
        shape, where = model_shape(model)
        found, how = lengths(workload, model, config.extract, shape.context_tokens)
        models[name] = (shape, found)
        if not shape.known:
            assumptions.append(f"{name}: architecture {shape.family!r} is counted like a Llama")
        if how == "assumed" and not workload.assumptions:
            assumptions.append(f"{name}: no tokenizer at hand ({where}), 4 bytes a token")
    stages = ("extract", "train", "align", "merge")
    base = process_bytes(stages) if hardware.on_cpu else _GPU_HOST_BYTES
    pivot, pivot_lengths = models["pivot"]
    threads = len(os.sched_getaffinity(0)) if hardware.on_cpu else _GPU_HOST_THREADS
    rows: list[StagePlan] = []
    own = {source_name(source): source.extract for source in config.sources}
    for name, (shape, found) in models.items():
        settings = own.get(name) or config.extract
        rows.append(plan_extraction(name, shape, found, settings, hardware, base["extract"]))
    for name in names:
        shape, found = models[name]
        top_k = (own[name] or config.extract).top_k
        rows.append(plan_alignment(name, pivot, shape, found, top_k, config.align, hardware, base["align"]))
    strategies: dict[str, int] = {}
    trained = (names if config.train.mode == "pairwise" else [MULTI]) + [SFT] * config.train.sft_control
    for name in trained:
        row, table = plan_training(name, pivot, pivot_lengths, config.train, hardware, base["train"])
        rows.append(row)
        strategies = dict(table)
    rows.append(plan_merge(pivot, len(names), threads, hardware, base["merge"], config.merge.method))
    if workload.n_held_out:
        scored = dict(models) if config.eval.sources else {"pivot": models["pivot"]}
        scored |= {f"target {name}": models["pivot"] for name in trained}
        scored |= {"merged": models["pivot"]}
        rows.append(plan_evaluation(scored, workload.n_held_out, config.extract, hardware, base["extract"]))
    shares = hardware.efficiency
    measured = ", measured now" if hardware.on_cpu else ""
    assumptions += [
        f"{hardware.flops['bfloat16'] / 1e12:.3g} TFLOP/s a device{measured}, of which extraction attains "
        f"{shares['extract']:.0%} and training {shares['train']:.0%}; disk {hardware.disk_rate_bytes / 1e9:.3g} GB/s",
        f"alignment and merging at the rates of one core of a 2-core Xeon; merging on {threads} threads",
    ]
    return Plan(
        hardware=hardware,
        stages=tuple(rows),
        strategies=strategies,
        disk_limit_bytes=disk_limit_bytes,
        assumptions=tuple(assumptions),
    )
