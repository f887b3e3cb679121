"""Shards of the output as Ray tasks: they are independent, and all see the same file system."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusechat.artifact import Json
from fusechat.merge.inputs import Handles
from fusechat.merge.layout import Shard
from fusechat.merge.output import Workplace, open_shard
from fusechat.merge.tensor import Job, merge_one
from fusechat.ray import ray_cluster, room_for


def merge_shard(job: Job, shard: Shard, directory: Path, finished: frozenset[str]) -> dict[str, Json]:
    """Merge the unfinished tensors of one shard, in whatever process this is, and return their statistics."""
    with ExitStack() as stack:
        here = replace(job, handles=Handles(stack))
        fd, fresh = open_shard(directory, shard)
        stack.callback(os.close, fd)
        done = {
            slot.plan.name: merge_one(here, slot.plan, fd, slot.offset)
            for slot in shard.slots
            if fresh or slot.plan.name not in finished
        }
        os.fsync(fd)
        return done


def write_on_ray(
    job: Job,
    prepared: Callable[[], Job],
    workplace: Workplace,
    shards: Sequence[Shard],
    address: str,
    note_progress: Callable[[Shard], None],
) -> None:
    """Merge every shard as a task of the Ray cluster at `address` ("local" starts one here).

    `prepared` gives the job with what it needs to know of all tensors; as that may read them all, the cluster is asked
    first. Raises ConfigError when Ray is absent, cannot be reached, or has no machine of so many threads, and whatever
    a task raised.
    """
    with ray_cluster(address) as ray:
        room_for(ray, cpus=job.threads, mend="lower --threads")
        # Descriptors do not travel: every task opens its own.
        travelling = replace(prepared(), handles=None)
        remote: Any = ray.remote(num_cpus=job.threads)(merge_shard)
        finished = frozenset(workplace.finished)
        waiting = {remote.remote(travelling, shard, workplace.directory, finished): shard for shard in shards}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            shard = waiting.pop(ready)
            for tensor, numbers in ray.get(ready).items():
                workplace.note(tensor, numbers)
            note_progress(shard)
