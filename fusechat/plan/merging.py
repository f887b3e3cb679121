"""What merging the targets takes, once or in a sweep that scores every merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusechat.config import ExtractConfig
from fusechat.merge.config import parse_merge_config
from fusechat.merge.estimate import expected_engine_bytes, n_seen, n_selections
from fusechat.model_shape import ModelShape, count_parameters, stored_bytes
from fusechat.plan.extraction import on_device
from fusechat.plan.hardware import Hardware
from fusechat.plan.process import GPU_PROCESS_BYTES
from fusechat.plan.scoring import scoring_parts, scoring_work
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths

# CPU-seconds an element of every model that is read, one thread of a 2-core AMD EPYC, starting the process included
# (bench/results/merge-cpu-2026-11-28.json): six models of 0.468 billion parameters, of 0.116 but for sce.
_S_PER_ELEMENT = {
    "sce": 6.60 / (6 * 0.468e9),
    "ties": 4.35 / (6 * 0.116e9),
    "dare_ties": 2.70 / (6 * 0.116e9),
    "task_arithmetic": 1.55 / (6 * 0.116e9),
    "linear": 1.27 / (6 * 0.116e9),
}


def plan_merge(
    method: str, pivot: ModelShape, n_targets: int, threads: int, hardware: Hardware, base_bytes: int
) -> StagePlan:
    """Return what one merge of the targets takes: the engine's buffers, whatever the size of the model."""
    computing, moving = _seconds(method, pivot, n_targets, threads, hardware)
    return StagePlan(
        stage="merge",
        name=method,
        parameters=count_parameters(pivot),
        devices=0,
        host_parts={"process": base_bytes, "engine": expected_engine_bytes(n_targets, threads)},
        host_limit_bytes=hardware.host_memory_bytes,
        disk_parts={"merged model": stored_bytes(pivot)},
        seconds=max(computing, moving),
        settings={"threads": threads, "bound_by": "disk" if moving > computing else "cores"},
    )


def plan_sweep(
    recipes: Sequence[Mapping[str, Any]],
    pivot: ModelShape,
    lengths: Lengths,
    n_validation: int,
    config: ExtractConfig,
    threads: int,
    hardware: Hardware,
    base_bytes: int,
) -> StagePlan:
    """Return what trying out merges takes: each is made, scored on the validation dialogues in the same process, and
    stands beside the best one so far.

    `base_bytes` are those of a process that scores.
    """
    merges = [parse_merge_config(recipe, "merge.sweep") for recipe in recipes]
    merging = sum(max(_seconds(merge.method_name, pivot, len(merge.targets), threads, hardware)) for merge in merges)
    flops, scoring = scoring_work(pivot, lengths, n_validation, config, hardware)
    engine = max(expected_engine_bytes(n_seen(merge), threads, n_selections(merge)) for merge in merges)
    parts = scoring_parts(pivot, lengths, n_validation, config, base_bytes)
    while_merging = {"process": base_bytes, "engine": engine}
    common: dict[str, Any] = {
        "stage": "merge",
        "name": "sweep",
        "parameters": count_parameters(pivot),
        "flops": len(merges) * flops,
        "disk_parts": {"merged model": stored_bytes(pivot)},
        "temporary_disk_parts": {"another merge": stored_bytes(pivot)},
        "seconds": merging + len(merges) * scoring,
        "settings": {"threads": threads, "merges": len(merges), "validation_dialogues": n_validation},
        "host_limit_bytes": hardware.host_memory_bytes,
        "changes": ("a smaller extract.batch_tokens",),
    }
    if hardware.on_cpu:
        held = max(parts, while_merging, key=lambda held: sum(held.values()))  # one after the other
        return StagePlan(**common, devices=0, host_parts=held)
    return StagePlan(
        **common, devices=1, device_parts=on_device(parts, pivot, config), device_limit_bytes=hardware.memory_bytes,
        host_parts=while_merging | {"process": GPU_PROCESS_BYTES},
    )  # fmt: skip


def _seconds(method: str, pivot: ModelShape, n_targets: int, threads: int, hardware: Hardware) -> tuple[float, float]:
    """Return how long a merge computes (as sce where its own rate was not measured), and how long the disk takes."""
    computing = count_parameters(pivot) * (n_targets + 1) * _S_PER_ELEMENT.get(method, _S_PER_ELEMENT["sce"]) / threads
    return computing, stored_bytes(pivot) * (n_targets + 2) / hardware.disk_rate_bytes
