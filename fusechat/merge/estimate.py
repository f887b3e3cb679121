"""What a merge will need, before it starts: memory, disk, time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from fusechat.artifact import Json
from fusechat.errors import ConfigError
from fusechat.merge.config import MergeConfig
from fusechat.merge.inputs import Model, TensorPlan
from fusechat.merge.layout import Shard
from fusechat.merge.tensor import Job, merge_one

# csrc/merge, per thread: one chunk of 16,384 items of every source at four bytes, two tiles of every delta, a segment
# of 65,536 items of what waits in the output's place. For selections: a sample of at most 2^18 keys (twice that for
# several), lists that double as they grow, with their keys (a third of a list), and a target's histograms of 2^14 bins.
_CHUNK_BYTES = 16384 * 4
_TILE_BYTES = 512 * 4
_SEGMENT_BYTES = 65536 * 4
_SAMPLE_BYTES = 8 << 18
_LIST_BYTES, _LEAST_LIST_BYTES, _MOST_LIST_BYTES = 8 << 20, 1 << 18, 3 << 20
_MOST_LIST_GROWTH, _MEAN_LIST_GROWTH = 2 + 1 / 3, 1.5 + 1 / 3
_HISTOGRAM_BYTES = 2 * 24 << 14
_TIMED_ITEMS = 1 << 20


def engine_bytes(n_targets: int, threads: int, n_selections: int = 1) -> int:
    """Return an upper bound of what the engine allocates; it does not depend on the size of any tensor.

    `n_selections`: one of all targets (sce), or one per target (ties).
    """
    return _buffer_bytes(n_targets, threads, n_selections, _MOST_LIST_GROWTH) + n_targets * _HISTOGRAM_BYTES


def expected_engine_bytes(n_targets: int, threads: int, n_selections: int = 1) -> int:
    """Return what the engine takes as a rule: lists half grown, and no bracket so full that it needs histograms."""
    return _buffer_bytes(n_targets, threads, n_selections, _MEAN_LIST_GROWTH)


def _buffer_bytes(n_targets: int, threads: int, n_selections: int, list_growth: float) -> int:
    per_thread = (n_targets + 1) * (_CHUNK_BYTES + 2 * _TILE_BYTES) + _CHUNK_BYTES + _TILE_BYTES + _SEGMENT_BYTES
    one_list = min(max(_LIST_BYTES // n_selections, _LEAST_LIST_BYTES), _MOST_LIST_BYTES)
    lists = int(list_growth * n_selections * one_list)
    return threads * per_thread + min(n_selections, 2) * _SAMPLE_BYTES + lists


def n_seen(config: MergeConfig) -> int:
    """Return how many models the engine sees beside its base; slerp gives it the merge's own base as one of them."""
    return len(config.targets) + (config.method_name == "slerp")


def n_selections(config: MergeConfig) -> int:
    """Return how many selections of a tensor's elements run at once: ties makes one per target."""
    return len(config.targets) if config.method_name == "ties" else 1


def adapter_bytes(models: Sequence[Model]) -> int:
    """Return the most memory that one tensor's factors of all models' adapters take together."""
    return sum(model.adapter.largest_bytes for model in models if model.adapter)


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads_within(
    max_memory_bytes: int | None, threads: int, n_targets: int, n_selections: int, adapter_bytes: int
) -> int:
    """Return how many threads fit a memory limit; raises ConfigError when not even one does."""
    if max_memory_bytes is None:
        return threads
    held = resident_bytes() + adapter_bytes
    while threads > 1 and held + engine_bytes(n_targets, threads, n_selections) > max_memory_bytes:
        threads -= 1
    needed = held + engine_bytes(n_targets, threads, n_selections)
    if needed > max_memory_bytes:
        raise ConfigError(
            f"--max-memory {max_memory_bytes / 1e6:.0f} MB is too little: this merge needs {needed / 1e6:.0f} MB"
        )
    return threads


def estimate(job: Job, shards: Sequence[Shard], plans: Sequence[TensorPlan]) -> Json:
    """Return the needs of a merge; the time is one tensor's, measured, scaled up."""
    n_elements = sum(plan.n for plan in plans)
    held = resident_bytes() + adapter_bytes([job.base, *job.targets])
    input_bytes = sum(entry.size_bytes for plan in plans for entry in (plan.base, *plan.targets))
    return {
        "n_tensors": len(plans),
        "n_elements": n_elements,
        "input_bytes": input_bytes,
        "output_bytes": sum(shard.size_bytes for shard in shards),
        "n_shards": len(shards),
        "threads": job.threads,
        "memory_bytes": held + engine_bytes(n_seen(job.config), job.threads, n_selections(job.config)),
        "seconds": _seconds_per_element(job, plans) * n_elements,
    }


def _seconds_per_element(job: Job, plans: Sequence[TensorPlan]) -> float:
    floats = [plan for plan in plans if not plan.copy and not plan.extras]
    if not floats:
        return 0.0
    within = [plan for plan in floats if plan.n <= _TIMED_ITEMS]
    chosen = max(within or [min(floats, key=lambda plan: plan.n)], key=lambda plan: plan.n)
    sink = os.memfd_create("dry run")
    try:
        started = time.perf_counter()
        merge_one(job, chosen, sink, 0)
        return (time.perf_counter() - started) / max(chosen.n, 1)
    finally:
        os.close(sink)
