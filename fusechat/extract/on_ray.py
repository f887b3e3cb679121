"""Shards as rows of a Ray data set: actors hold engines, all see the same file system."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from fusechat.artifact import Json
from fusechat.devices import cuda_devices
from fusechat.errors import ConfigError
from fusechat.extract.backend import open_scorer
from fusechat.extract.scores import Advance
from fusechat.extract.task import Shard, Task, open_work
from fusechat.extract.tensor_parallel import sized
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
    Raises ConfigError when the machines have no room for so many, or no GPUs for one, and what an actor raised.
    """
    assert task.config.ray is not None
    with ray_cluster(task.config.ray) as ray:
        gpus = max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
        task = sized(task, gpus, partial(_gpu_memory_bytes, ray))
        share = {"cpus": 0, "gpus": task.config.tensor_parallel_size or 1} if gpus else {"cpus": 1}
        actors = n_actors(ray, task.config.engines, share)
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        for row in actor_results(ray, ShardActor, (task,), rows, actors=actors, **share):
            result: Json = json.loads(row["note"])
            note(pickle.loads(row["shard"]), result)
            advance(result.get("n_tokens", 0))


def n_actors(ray: Any, engines: int | None, share: dict[str, int]) -> int:
    """Return how many actors of a share of a machine's cores or GPUs there are to be; raises ConfigError when the
    cluster has no room for those that were asked for: Ray would wait for more machines."""
    mend = "lower extract.tensor_parallel_size" if "gpus" in share else "start one with CPUs (ray start --num-cpus)"
    room = room_for(ray, **share, mend=mend)
    if engines is not None and engines > room:
        each = f"{share['gpus']} GPUs" if "gpus" in share else f"{share['cpus']} CPU"
        raise ConfigError(
            f"extract.engines: {engines} of {each} each do not fit the Ray cluster, which has room for {room}"
        )
    return engines or (room if "gpus" in share else 1)


def _gpu_memory_bytes(ray: Any) -> int | None:
    """Return the memory of a GPU of the cluster, None where its machine does not say."""
    found = ray.get(ray.remote(num_cpus=0, num_gpus=1)(cuda_devices).remote())
    return min((device.memory_bytes for device in found), default=None)
