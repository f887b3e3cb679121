"""Over how many GPUs one vLLM engine spreads its model: extraction chooses, and the plan tells, by one function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from fusechat.config import ExtractConfig
from fusechat.errors import FusechatError
from fusechat.extract.budget import gpu_memory_utilization, prompt_logprob_bytes, step_tokens
from fusechat.extract.task import Task
from fusechat.model_shape import ITEM_BYTES, ModelShape, kv_bytes_per_token, shape_of_directory, stored_bytes

log = logging.getLogger(__name__)

CUDA_BYTES = 1_000_000_000  # context and libraries
# What weights become under a method that is not in the checkpoint's config but asked for.
_QUANTISED_TO = {
    "fp8": "fp8", "ptpc_fp8": "fp8", "int8": "int8", "bitsandbytes": "int4", "awq": "int4", "awq_marlin": "int4",
    "gptq": "int4", "gptq_marlin": "int4",
}  # fmt: skip


def computed_in(shape: ModelShape, config: ExtractConfig) -> str:
    """Return the dtype of the forward pass."""
    return shape.dtype if config.dtype == "auto" else config.dtype


def weight_bytes(shape: ModelShape, config: ExtractConfig) -> int:
    """Return the size of the weights as vLLM holds them: as they are stored where they are quantised or of the forward
    pass's dtype, else in that dtype or as `extract.quantization` leaves them."""
    held_in = _QUANTISED_TO.get(config.quantization or "", computed_in(shape, config))
    return stored_bytes(shape, None if shape.quantisation or held_in == shape.in_file else held_in)


def gpu_parts(
    shape: ModelShape, config: ExtractConfig, memory_bytes: int, size: int, *, quantised_to: str | None = None
) -> dict[str, int]:
    """Return what one of an engine's `size` GPUs holds, in bytes: its share of the weights, CUDA, the cache of one
    longest sequence or of a step's tokens, what they take inside the layers, and what vLLM does not count: the logits
    and log-softmax of a step.

    `quantised_to` tells how it would be with weights of fp8 or int4.
    """
    item = int(ITEM_BYTES.get(computed_in(shape, config), 2))
    step = step_tokens(config, shape.vocab, memory_bytes, dtype_bytes=item)
    kept = max(min(config.max_length_tokens, shape.context_tokens) + 1, step)
    width = 4 * shape.hidden + 3 * shape.intermediate // size
    weights = stored_bytes(shape, quantised_to) if quantised_to else weight_bytes(shape, config)
    return {
        "weights": -(-weights // size),
        "kv cache": kept * kv_bytes_per_token(shape, item) // min(size, shape.kv_heads),
        "activations": step * width * item,
        "logits": prompt_logprob_bytes(step, shape.vocab, dtype_bytes=item),
        "cuda": CUDA_BYTES,
    }


def counted_by_vllm(parts: Mapping[str, int]) -> int:
    """Return what of a GPU's parts must fit the share of its memory that vLLM takes."""
    return sum(size for part, size in parts.items() if part not in ("logits", "cuda"))


def fits_gpu(parts: Mapping[str, int], config: ExtractConfig, memory_bytes: int) -> bool:
    """Return whether a GPU of so much memory holds an engine's parts, vLLM's own within vLLM's share of it."""
    return (
        counted_by_vllm(parts) <= gpu_memory_utilization(config) * memory_bytes
        and sum(parts.values()) <= memory_bytes
    )  # fmt: skip


def splits(shape: ModelShape, gpus: int) -> list[int]:
    """Return the numbers of GPUs, up to `gpus`, that divide the model's heads and its MLP evenly."""
    return [
        n
        for n in range(1, min(gpus, shape.heads) + 1)
        if shape.heads % n == 0
        and shape.intermediate % n == 0
        and (shape.kv_heads % n == 0 or n % shape.kv_heads == 0)
    ]  # fmt: skip


def smallest_size(
    shape: ModelShape, config: ExtractConfig, gpus: int, memory_bytes: int, *, quantised_to: str | None = None
) -> int | None:
    """Return over how few of `gpus` GPUs of so much memory an engine can spread the model; None where all do not do."""
    for n in splits(shape, gpus):
        if fits_gpu(gpu_parts(shape, config, memory_bytes, n, quantised_to=quantised_to), config, memory_bytes):
            return n
    return None


def tensor_parallel_size(shape: ModelShape, config: ExtractConfig, gpus: int, memory_bytes: int) -> int:
    """Return over how many GPUs vLLM spreads the model: as `extract.tensor_parallel_size` says, else the fewest that
    hold it, or all that can share it where even they do not."""
    if config.tensor_parallel_size is not None:
        return config.tensor_parallel_size
    return smallest_size(shape, config, gpus, memory_bytes) or max(splits(shape, gpus), default=1)


def sized(task: Task, gpus: int, find_memory_bytes: Callable[[], int | None]) -> Task:
    """Return the task with a number for `extract.tensor_parallel_size`, where vLLM is to work on GPUs and none was
    given: 1 where the memory of a GPU, which is asked for only then, or the model's sizes are not known."""
    config = task.config
    if config.backend != "vllm" or config.tensor_parallel_size is not None or not gpus:
        return task
    size = 1
    memory_bytes = find_memory_bytes()
    if memory_bytes is None:
        log.info("%s: how large the GPUs are is not known here; one each, or extract.tensor_parallel_size", task.model)
    else:
        try:
            shape, _ = shape_of_directory(task.directory)
        except FusechatError as error:
            log.info("%s: one GPU an engine, for its sizes are not known: %s", task.model, error)
        else:
            size = tensor_parallel_size(shape, config, gpus, memory_bytes)
    return replace(task, config=config.model_copy(update={"tensor_parallel_size": size}))
