"""Shards as rows of a Ray data set: actors hold the vocabularies and their maps, and all see the same file system."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from fusechat.align.shards import Corpus, ShardWork, Task
from fusechat.ray import actor_results, room_for


class ShardActor:
    """Holds what is opened, and counts or writes the shards that come its way."""

    def __init__(self, task: Task, corpus: Corpus, what: str) -> None:
        self._call = getattr(ShardWork(task, corpus), what)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": pickle.dumps(self._call(row["number"]))}


def map_on_ray(ray: Any, task: Task, corpus: Corpus, what: str, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yield (number, what ShardWork's method `what` gives) for these shards as they are done, in no fixed order.

    There are as many actors as the cluster has cores for `task.threads` each; raises ConfigError when not for one.
    """
    if not numbers:
        return
    actors = room_for(ray, cpus=task.threads, mend="lower --threads")
    rows = [{"number": number} for number in numbers]
    for row in actor_results(ray, ShardActor, (task, corpus, what), rows, actors=actors, cpus=task.threads):
        yield int(row["number"]), pickle.loads(row["result"])
