"""Shards as rows of a Ray data set: actors hold engines, all see the same file system."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from fusechat.artifact import Json
from fusechat.errors import ConfigError
from fusechat.extract.backend import open_scorer
from fusechat.extract.scores import Advance
from fusechat.extract.task import Shard, Task, open_work
from fusechat.ray import ray_cluster


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

    There are `engines` actors, or one for every `tensor_parallel_size` GPUs of the cluster. Raises ConfigError for
    the vllm-server backend, whose work is done elsewhere anyway, and what an actor raised.
    """
    config = task.config
    if config.backend == "vllm-server":
        raise ConfigError("ray and backend: vllm-server do not go together: one process is enough to ask servers")
    assert config.ray is not None
    with ray_cluster(config.ray) as ray:
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        if not rows:
            return
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actors = config.engines or max(1, gpus // config.tensor_parallel_size)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        notes = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            ShardActor,
            fn_constructor_args=(task,),
            concurrency=min(actors, len(rows)),
            num_gpus=config.tensor_parallel_size if gpus else 0,
        )
        for row in notes.iter_rows():
            result: Json = json.loads(row["note"])
            note(pickle.loads(row["shard"]), result)
            advance(result.get("n_tokens", 0))
