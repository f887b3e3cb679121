"""What a fusion will need, before it is paid for: per stage and source memory, disk, work and time.

Nothing here reads a weight: configs, safetensors headers, and the dialogues' lengths are enough.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fusechat.align.stage import chosen_rules
from fusechat.artifact import Json
from fusechat.callable_module import make_callable
from fusechat.config import ExtractConfig, RunConfig, source_name
from fusechat.extract.settings import models_with_settings
from fusechat.layout import MULTI, SFT
from fusechat.model_shape import ModelShape
from fusechat.plan.alignment import plan_alignment
from fusechat.plan.extraction import plan_extraction
from fusechat.plan.hardware import Hardware
from fusechat.plan.merging import plan_merge, plan_sweep
from fusechat.plan.models import model_shape
from fusechat.plan.process import GPU_PROCESS_BYTES, process_bytes
from fusechat.plan.scoring import plan_evaluation
from fusechat.plan.stage import StagePlan
from fusechat.plan.training import plan_training
from fusechat.plan.workload import Lengths, Workload, find_workload, lengths

__all__ = ["Plan", "plan"]
make_callable(__name__)

_TRUST = "extract.trust_remote_code: true, which runs it (read it first)"
_GPU_HOST_THREADS = 16
_GPU_HOST_BYTES = {
    "extract": GPU_PROCESS_BYTES, "train": GPU_PROCESS_BYTES,
    "align": 60_000_000, "align cells": 180_000_000, "merge": 40_000_000,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """A model of the run: its sizes, the data set in its tokens, and what it is extracted with."""

    shape: ModelShape
    lengths: Lengths
    extract: ExtractConfig


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
        """The most the run needs on the disk: what everything leaves, and what one stage needs besides."""
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
    set of which nothing is known and for an alignment that is none.
    """
    workload = find_workload(config, dialogues, tokens_per_dialogue)
    models, found = _models(config, workload)
    assumptions = [*workload.assumptions, *found]
    names = [source_name(source) for source in config.sources]
    rules = chosen_rules(**config.align.model_dump())
    aligning = "align cells" if rules["granularity"] == "cells" else "align"
    stages = ("extract", "train", aligning, "merge")
    base = process_bytes(stages) if hardware.on_cpu else _GPU_HOST_BYTES
    pivot = models["pivot"]
    threads = len(os.sched_getaffinity(0)) if hardware.on_cpu else _GPU_HOST_THREADS
    rows: list[StagePlan] = []
    for name, model in models.items():
        row = plan_extraction(name, model.shape, model.lengths, model.extract, hardware, base["extract"])
        rows.append(row if model.extract.trust_remote_code else _with_native_code(row, model.shape, _TRUST))
    for name in names:
        source, top_k, n_shard = models[name].shape, models[name].extract.top_k, pivot.extract.shard_dialogues
        rows.append(
            plan_alignment(
                name, pivot.shape, pivot.lengths, source, top_k, n_shard, rules, hardware, base[aligning]
            )
        )  # fmt: skip
    strategies: dict[str, int] = {}
    targets = names if config.train.mode == "pairwise" else [MULTI]
    trained = targets + [SFT] * config.train.sft_control
    for name in trained:
        row, table = plan_training(name, pivot.shape, pivot.lengths, config.train, hardware, base["train"])
        rows.append(_with_native_code(row, pivot.shape, "a pivot that transformers has"))
        strategies = dict(table)
    rows.append(_merge(config, targets, pivot, workload.n_validation, threads, hardware, base))
    scored = {"pivot": pivot}
    if config.eval.sources:  # those of servers are left out, as by the run
        scored |= {name: models[name] for name in names if models[name].extract.backend != "vllm-server"}
    scored |= {f"target {name}": pivot for name in trained}
    scored |= {"merged": pivot}
    shapes = {name: (model.shape, model.lengths) for name, model in scored.items()}
    rows.append(plan_evaluation(shapes, workload.n_held_out, config.extract, hardware, base["extract"]))
    shares = hardware.efficiency
    measured = ", measured now" if hardware.on_cpu else ""
    assumptions += [hardware.assumed] * bool(hardware.assumed)
    assumptions += [
        f"{hardware.flops['bfloat16'] / 1e12:.3g} TFLOP/s a device{measured}, of which extraction attains "
        f"{shares['extract']:.0%} and training {shares['train']:.0%}; disk {hardware.disk_rate_bytes / 1e9:.3g} GB/s",
        "alignment and merging at the rates of one core of a 2-core AMD EPYC (2026-11-28); "
        f"merging on {threads} threads",
    ]
    return Plan(
        hardware=hardware,
        stages=tuple(rows),
        strategies=strategies,
        disk_limit_bytes=disk_limit_bytes,
        assumptions=tuple(assumptions),
    )


def _models(config: RunConfig, workload: Workload) -> tuple[dict[str, _Model], list[str]]:
    """Return the pivot and the sources by name, and what had to be assumed of them."""
    models: dict[str, _Model] = {}
    assumptions: list[str] = []
    for name, (model, settings) in models_with_settings(config).items():
        shape, where = model_shape(model)
        found, how = lengths(workload, model, settings, shape.context_tokens)
        models[name] = _Model(shape=shape, lengths=found, extract=settings)
        if not shape.known:
            assumptions.append(f"{name}: architecture {shape.family!r} is counted like a Llama")
        if how == "assumed" and not workload.assumptions:
            assumptions.append(f"{name}: no tokenizer and template at hand ({where}), 4 bytes a token")
    return models, assumptions


def _with_native_code(row: StagePlan, shape: ModelShape, change: str) -> StagePlan:
    """Return a stage that runs no Python of a model's own: refused where transformers does not have the model."""
    if not shape.remote_code:
        return row
    refused = f"transformers has no {shape.family}, which brings Python of its own"
    return replace(row, refused=refused, changes=(change,))


def _merge(
    config: RunConfig,
    targets: Sequence[str],
    pivot: _Model,
    n_validation: int,
    threads: int,
    hardware: Hardware,
    base_bytes: Mapping[str, int],
) -> StagePlan:
    """Plan the merge that `fusechat run` makes: one, a linear one where all sources taught one target, or a sweep."""
    if not config.merge.sweep:
        method = "linear" if config.train.mode == "multi" else config.merge.method
        return plan_merge(method, pivot.shape, len(targets), threads, hardware, base_bytes["merge"])
    from fusechat.merge.sweep import candidates

    models = [{"model": name} for name in targets]
    recipes = [c.recipe for c in candidates({"base_model": config.pivot, "models": models}, config.merge.sweep)]
    return plan_sweep(
        recipes, pivot.shape, pivot.lengths, n_validation, config.extract, threads, hardware, base_bytes["extract"]
    )
