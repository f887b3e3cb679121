"""Shards as rows of a Ray data set: actors hold the vocabularies and their maps, and all see the same file system."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from fusechat.align.shards import ShardWork, Task
from fusechat.align.statistics import PairCounts


class ShardActor:
    """Holds what is opened, and counts or writes the shards that come its way."""

    def __init__(self, task: Task, counts: PairCounts | None, what: str) -> None:
        self._call = getattr(ShardWork(task, counts), what)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": pickle.dumps(self._call(row["number"]))}


def map_on_ray(
    ray: Any, task: Task, what: str, numbers: Sequence[int], counts: PairCounts | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (number, what ShardWork's method `what` gives) for these shards as they are done, in no fixed order.

    There are as many actors as the cluster has cores for `task.threads` each.
    """
    if not numbers:
        return
    actors = int(ray.cluster_resources().get("CPU", 1)) // task.threads
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"number": number} for number in numbers]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardActor,
        fn_constructor_args=(task, counts, what),
        concurrency=max(1, min(actors, len(rows))),
        num_cpus=task.threads,
    )
    for row in results.iter_rows():
        yield int(row["number"]), pickle.loads(row["result"])
