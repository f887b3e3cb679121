"""The backends by name, and where their engines run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

from fusechat.artifact import Json
from fusechat.config import ExtractConfig
from fusechat.devices import cuda_devices
from fusechat.errors import ConfigError
from fusechat.extract.child import ChildEngine
from fusechat.extract.scores import Scorer
from fusechat.extract.task import Task, Work, open_work
from fusechat.extract.tensor_parallel import sized


def open_scorer(task: Task) -> AbstractContextManager[Scorer]:
    """Open the task's backend, hf or vllm, in this process; raises DataError or ConfigError when it cannot be had."""
    if task.config.backend == "vllm":
        from fusechat.extract.vllm import open_vllm

        return open_vllm(task)
    from fusechat.extract.hf import open_hf

    return open_hf(task)


def engines_of(task: Task, earlier: Sequence[Json]) -> Sequence[AbstractContextManager[Work]]:
    """Return the engines that share a task's shards.

    An endpoint each for servers; else a child process for every group of `tensor_parallel_size` GPUs (where it is None,
    as many as made the shards that are there, else as few as hold the model), or for each of `engines` where there is
    no GPU. One hf engine on the CPU runs in this process: it has no GPU to give back. `earlier` says what made the
    shards that are there.
    """
    config = task.config
    if config.backend == "vllm-server":
        from fusechat.extract.probe import Probe
        from fusechat.extract.server import open_server

        probe = Probe(task, earlier)
        return [open_work(task, partial(open_server, url=url, probe=probe)) for url in config.servers]
    if config.backend == "vllm":
        n_visible = len(visible_devices())
        known = next((made_by["tensor_parallel_size"] for made_by in earlier), None) if n_visible else None
        if config.tensor_parallel_size is None and known is not None:  # another would round otherwise
            task = replace(task, config=config.model_copy(update={"tensor_parallel_size": known}))
        task = sized(task, n_visible, partial(_least_memory_bytes, n_visible))
    devices, groups = engine_places(task.config)
    on_cpu = not devices and "cuda" not in config.device and config.device_map in (None, "cpu")
    if config.backend == "hf" and len(groups) == 1 and on_cpu:
        return [open_work(task, open_scorer)]
    return [
        ChildEngine(
            task,
            environment=_ENVIRONMENT | (KEPT_HEAP if on_cpu else {}) | group,
            log_path=task.out.with_name(f"{task.out.name}.engine-{number}.log"),
        )
        for number, group in enumerate(groups)
    ]


def engine_places(config: ExtractConfig) -> tuple[list[str], list[dict[str, str]]]:
    """Return the CUDA devices for the engines of hf or vllm, and each engine's environment.

    Raises ConfigError when vLLM is asked for and not installed, or the devices do not suffice.
    """
    if config.backend == "vllm":
        from fusechat.extract.vllm import require_vllm

        require_vllm()
    if config.device_map is not None or config.device not in ("auto", "cuda"):
        return [], device_groups([], 1, config.engines)  # where it runs is said already
    devices = visible_devices()
    return devices, device_groups(devices, config.tensor_parallel_size or 1, config.engines)


# An engine's narration would fill the log before its errors do.
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"), "TOKENIZERS_PARALLELISM": "true"}


# glibc gives every freed block of 32 MB and more back to the system, and the next step's logits fault their pages in
# again: a fifth of vLLM's time on a CPU.
KEPT_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def visible_devices() -> list[str]:
    """Return the CUDA devices this process may use, by the names CUDA_VISIBLE_DEVICES knows them by."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _least_memory_bytes(devices: int) -> int | None:
    """Return the memory of the smallest of so many visible devices, None where they are not all known."""
    found = [device.memory_bytes for device in cuda_devices()]
    return min(found) if len(found) == devices else None


def device_groups(devices: Sequence[str], per_engine: int, engines: int | None) -> list[dict[str, str]]:
    """Return each engine's environment: which devices it sees.

    Without devices there is one engine unless more are asked for, and nothing to divide. Raises ConfigError when the
    devices do not suffice.
    """
    if not devices:
        return [{} for _ in range(engines or 1)]
    fit = len(devices) // per_engine
    if fit < (engines or 1):
        raise ConfigError(
            f"extract.engines: {engines or 1} of {per_engine} GPUs each do not fit the {len(devices)} that are visible"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(devices[i * per_engine : (i + 1) * per_engine])}
        for i in range(engines or fit)
    ]
