"""Shards as rows of a Ray data set: actors hold engines, all see the same file system."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from fusechat.artifact import Json
from fusechat.extract.backend import open_scorer
from fusechat.extract.scores import Advance
from fusechat.extract.task import Shard, Task, open_work
from fusechat.ray import actor_results, ray_cluster, room_for


class ShardActor:
    """Holds one engine and makes the shards that come its way."""

    def __init__(self, task: Task) -> None:
        self._open = ExitStack()
        self._work = self._open.enter_context(open_work(task, open_scorer))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard: Shard = pickle.loads(row["shard"])
        return {"shard": row["shard"], "note": json.dumps(self._work(shard, lambda tokens: None))}


def run_on_ray(task: Task, shards: Iterable[Shard], *, note: Callable[[Shard, Json], None], advance: Advance) -> None:
    """Make every shard on the actors of the cluster at `ray` and call `note(shard, its note)`.

    There are `engines` actors, or one for every `tensor_parallel_size` GPUs of a machine; one where there is no GPU.
    Raises ConfigError when no machine has GPUs for one, and what an actor raised.
    """
    config = task.config
    assert config.ray is not None
    with ray_cluster(config.ray) as ray:
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        on_gpus = ray.cluster_resources().get("GPU", 0) > 0
        share = {"cpus": 0, "gpus": config.tensor_parallel_size} if on_gpus else {"cpus": 1}
        mend = "lower extract.tensor_parallel_size" if on_gpus else "start one with CPUs (ray start --num-cpus)"
        room = room_for(ray, **share, mend=mend)
        actors = config.engines or (room if on_gpus else 1)
        for row in actor_results(ray, ShardActor, (task,), rows, actors=actors, **share):
            result: Json = json.loads(row["note"])
            note(pickle.loads(row["shard"]), result)
            advance(result.get("n_tokens", 0))
