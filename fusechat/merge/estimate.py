"""What a merge will need, before it starts: memory, disk, time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from fusechat.artifact import Json
from fusechat.errors import ConfigError
from fusechat.merge.inputs import TensorPlan
from fusechat.merge.layout import Shard
from fusechat.merge.tensor import Job, merge_one

# csrc/merge: one chunk of 16,384 items of every source at four bytes, two tiles of every delta, and a segment of 65,536
# items of what waits in the output's place, per thread; and what
# selection keeps: a sample of at most 2^18 keys, lists of 3 MiB (or 2^18 bytes a target, if that is more), which double
# as they grow, their keys, and a target's histograms of 2^14 bins.
_CHUNK_BYTES = 16384 * 4
_TILE_BYTES = 512 * 4
_SEGMENT_BYTES = 65536 * 4
_SAMPLE_BYTES = 8 << 18
_LIST_BYTES = (6 << 20) + (1 << 20)
_TARGET_BYTES = 1 << 18
_HISTOGRAM_BYTES = 2 * 24 << 14
_TIMED_ITEMS = 1 << 20


def engine_bytes(n_targets: int, threads: int) -> int:
    """Return an upper bound of what the engine allocates; it does not depend on the size of any tensor."""
    per_thread = (n_targets + 1) * (_CHUNK_BYTES + 2 * _TILE_BYTES) + _CHUNK_BYTES + _TILE_BYTES + _SEGMENT_BYTES
    lists = max(_LIST_BYTES, n_targets * _TARGET_BYTES)
    return threads * per_thread + _SAMPLE_BYTES + lists + n_targets * _HISTOGRAM_BYTES


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads_within(max_memory_bytes: int | None, threads: int, n_targets: int, adapter_bytes: int) -> int:
    """Return how many threads fit a memory limit; raises ConfigError when not even one does."""
    if max_memory_bytes is None:
        return threads
    held = resident_bytes() + adapter_bytes
    while threads > 1 and held + engine_bytes(n_targets, threads) > max_memory_bytes:
        threads -= 1
    needed = held + engine_bytes(n_targets, threads)
    if needed > max_memory_bytes:
        raise ConfigError(
            f"--max-memory {max_memory_bytes / 1e6:.0f} MB is too little: this merge needs {needed / 1e6:.0f} MB"
        )
    return threads


def estimate(job: Job, shards: Sequence[Shard], plans: Sequence[TensorPlan]) -> Json:
    """Return the needs of a merge; the time is one tensor's, measured, scaled up."""
    n_elements = sum(plan.n for plan in plans)
    input_bytes = sum(entry.size_bytes for plan in plans for entry in (plan.base, *plan.targets))
    return {
        "n_tensors": len(plans),
        "n_elements": n_elements,
        "input_bytes": input_bytes,
        "output_bytes": sum(shard.size_bytes for shard in shards),
        "n_shards": len(shards),
        "threads": job.threads,
        "memory_bytes": resident_bytes() + engine_bytes(len(job.targets), job.threads),
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
