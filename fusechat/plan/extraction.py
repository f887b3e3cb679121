"""What extracting one model's top-k takes: with vLLM, with transformers, or from servers elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusechat.config import ExtractConfig
from fusechat.extract.batches import length_batches
from fusechat.extract.budget import gpu_memory_utilization, step_tokens
from fusechat.extract.tensor_parallel import (
    CUDA_BYTES,
    computed_in,
    counted_by_vllm,
    fits_gpu,
    gpu_parts,
    smallest_size,
    tensor_parallel_size,
)
from fusechat.loss_chunks import TOPK_ENGINE_BUDGET_BYTES, TOPK_ENGINE_ROWS, TOPK_GPU_BUDGET_BYTES
from fusechat.model_shape import ITEM_BYTES, ModelShape, count_parameters, forward_flops, stored_bytes
from fusechat.plan.hardware import Hardware, this_computer
from fusechat.plan.process import GPU_PROCESS_BYTES
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths
from fusechat.quantity import human_bytes
from fusechat.store import id_dtype

# glibc keeps a freed block below its largest mmap threshold in its heap, and cannot give it to the next aligned request
# of the same size: such buffers take their room twice (measured, docs/plan.md).
HEAP_BLOCK_BYTES = 32 << 20
GROUP_TOKENS = 128  # the top-k's kernel keeps a maximum for so many logits
TOKEN_BYTES = 4 + 1 + 4 + 4  # in memory: input_ids, loss_mask, turn, byte_end
GOLD_AMONG_TOP = 0.9  # rows whose gold token is one of their k, k = 10 (docs/extraction.md); assumed for every model
_SERVER_TOKENS_PER_S = 7000.0  # one API process makes JSON of 750 bytes a token (docs/extraction.md)


def store_bytes(lengths: Lengths, vocab: int, top_k: int, gold_among_top: float = GOLD_AMONG_TOP) -> int:
    """Return the size of a TopKStore's columns and offsets as they lie on disk (fusechat/packing.py).

    A row holds its k entries, a token of the assistant's a width, a turn three places. The gold token and its
    log-probability go by their place in the row, where that is smaller (fusechat/packed_gold.py).
    """
    id_bytes = id_dtype(vocab).itemsize
    rows, tokens = lengths.rows, lengths.tokens
    found = gold_among_top * rows
    by_place = (tokens - rows) * id_bytes + rows + found * 2 + (rows - found) * (id_bytes + 4)
    as_it_is = tokens * id_bytes + rows * 4
    n_axes = 7 if by_place < as_it_is else 4
    dialogue_bytes = 8 + n_axes * 8 + lengths.turns_per_dialogue * 3 * 4
    entries = rows * (top_k * (id_bytes + 2) + 1)
    return int(entries + min(by_place, as_it_is) + lengths.n_dialogues * dialogue_bytes)


def plan_extraction(
    name: str, shape: ModelShape, lengths: Lengths, config: ExtractConfig, hardware: Hardware, process_bytes: int
) -> StagePlan:
    """Return what extracting a model takes on the hardware."""
    flops = forward_flops(shape, lengths.tokens, lengths.typical, lengths.rows)
    disk = {"top-k store": store_bytes(lengths, shape.vocab, config.top_k)}
    dtype = computed_in(shape, config)
    common: dict[str, Any] = {
        "stage": "extract", "name": name, "parameters": count_parameters(shape), "flops": flops, "disk_parts": disk,
    }  # fmt: skip
    if config.backend == "vllm-server":
        return StagePlan(
            **common, devices=0, host_parts={"process": process_bytes}, host_limit_bytes=hardware.host_memory_bytes,
            seconds=lengths.tokens / (_SERVER_TOKENS_PER_S * len(config.servers)), settings={"backend": config.backend},
        )  # fmt: skip
    if config.backend == "vllm" and not hardware.on_cpu:
        return _with_vllm(common, shape, config, hardware)
    parts = hf_parts(shape, lengths, config, process_bytes)
    settings = {"backend": "hf", "batch_tokens": config.batch_tokens, "dtype": dtype}
    changes = ("a smaller extract.batch_tokens", "extract.dtype: bfloat16", "extract.backend: vllm-server")
    if hardware.on_cpu:
        return StagePlan(
            **common, devices=0, host_parts=parts, host_limit_bytes=hardware.memory_bytes, settings=settings,
            seconds=flops / hardware.rate("extract", dtype), changes=changes,
        )  # fmt: skip
    if "cpu" in (config.device, config.device_map):  # nothing describes that processor: this computer's rate stands in
        return StagePlan(
            **common, devices=0, host_parts=parts, host_limit_bytes=hardware.host_memory_bytes,
            settings=settings | {"device": "cpu, at this computer's rate"}, changes=changes,
            seconds=flops / this_computer().rate("extract", dtype),
        )  # fmt: skip
    # A named device, or a placement over several, is one engine's.
    placed = config.device_map is not None or config.device not in ("auto", "cuda")
    engines = 1 if placed else _engines(config, hardware, 1)
    refused, fewer = ("", ()) if placed else _asked_for_too_much(config, hardware, 1)
    return StagePlan(
        **common, devices=engines, device_parts=on_device(parts, shape, config),
        device_limit_bytes=hardware.memory_bytes,
        host_parts={"processes": engines * process_bytes}, host_limit_bytes=hardware.host_memory_bytes,
        settings=settings | {"engines": engines}, seconds=flops / (engines * hardware.rate("extract", dtype)),
        refused=refused, changes=fewer or ("extract.backend: vllm", *changes),
    )  # fmt: skip


def _engines(config: ExtractConfig, hardware: Hardware, group: int) -> int:
    """Return how many engines of a group of GPUs each share the shards, as fusechat.extract.backend divides them."""
    return min(max(1, hardware.devices // group), config.engines or hardware.devices)


def on_device(parts: Mapping[str, int], shape: ModelShape, config: ExtractConfig) -> dict[str, int]:
    """Return what of the transformers backend's parts lies on a GPU, where weights are whole, and its own chunk of
    logits; its allocator reuses what a heap would keep."""
    item = int(ITEM_BYTES[computed_in(shape, config)])
    rows = TOPK_GPU_BUDGET_BYTES // (shape.vocab * item)
    logits = rows * (shape.vocab * item + 4 * -(-shape.vocab // GROUP_TOKENS))
    weights = _weight_bytes(shape, config)
    return {"weights": weights, "forward": parts["forward"], "logits": logits, "cuda": CUDA_BYTES}


def _weight_bytes(shape: ModelShape, config: ExtractConfig) -> int:
    return stored_bytes(shape, None if _as_in_file(shape, config) else computed_in(shape, config))


def _as_in_file(shape: ModelShape, config: ExtractConfig) -> bool:
    return computed_in(shape, config) == shape.in_file or shape.quantisation is not None


def hf_parts(shape: ModelShape, lengths: Lengths, config: ExtractConfig, process_bytes: int) -> dict[str, int]:
    """Return what the transformers backend holds at its peak on the CPU.

    Weights of the asked dtype are pages of their file, and of an untied embedding only the rows that occur are read.
    The widest moment of a layer is its MLP (three intermediate widths) or its attention; in half precision sequences
    are padded to batches, and under a mask keys and values are widened to all heads. Results are those of one shard.
    """
    dtype = computed_in(shape, config)
    item = int(ITEM_BYTES[dtype])
    mapped = _as_in_file(shape, config) and not shape.tied
    unread = (shape.vocab - min(shape.vocab, lengths.distinct_ids)) * shape.hidden if mapped else 0
    n_held = min(config.shard_dialogues, lengths.n_dialogues)
    sample = lengths.sample[:n_held].tolist()
    count, longest = 1, max(sample)
    if item < 4:
        batches = [(len(batch), sample[batch[0]]) for batch in length_batches(sample, config.batch_tokens)]
        count, longest = max(batches, key=lambda batch: batch[0] * batch[1])
    padded = count * longest
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 3 * query + 2 * (query if count > 1 else 0) + 2 * key
    width = 2 * shape.hidden + max((3 if shape.gated else 2) * shape.intermediate, attention)
    rows = padded * lengths.row_share
    forward = padded * width * item
    columns = min(shape.vocab, TOPK_ENGINE_BUDGET_BYTES // (TOPK_ENGINE_ROWS * item))
    head = int(min(rows, TOPK_ENGINE_ROWS) * columns * item)
    heap = forward * (padded * shape.intermediate * item < HEAP_BLOCK_BYTES) + head
    row_bytes = config.top_k * 14 + 8
    mask = count * longest**2 * (1 + item) if count > 1 else 0
    return {
        "process": process_bytes,
        "weights": _weight_bytes(shape, config) - unread * item,
        "forward": forward + mask + int(rows) * shape.hidden * item,
        "logits": head,
        "kept by the heap": int(heap),
        "results": int(n_held * lengths.tokens / lengths.n_dialogues * (TOKEN_BYTES + lengths.row_share * row_bytes)),
    }


def _with_vllm(common: dict[str, Any], shape: ModelShape, config: ExtractConfig, hardware: Hardware) -> StagePlan:
    gpus, memory = hardware.devices, hardware.memory_bytes
    dtype = computed_in(shape, config)
    size = tensor_parallel_size(shape, config, gpus, memory)
    parts = gpu_parts(shape, config, memory, size)
    engines = _engines(config, hardware, size)
    utilization = gpu_memory_utilization(config)
    counted, share = counted_by_vllm(parts), int(utilization * memory)
    refused, changes = _asked_for_too_much(config, hardware, size)
    if shape.heads % size:
        refused, changes = f"vLLM cannot divide {shape.heads} heads among {size} GPUs", ()
    elif not refused and counted > share:
        refused = f"{human_bytes(counted)} where vLLM takes {human_bytes(share)} of a GPU"
    if not changes and (refused or not fits_gpu(parts, config, memory)):
        changes = _changes(shape, config, hardware, size)
    step = step_tokens(config, shape.vocab, memory, dtype_bytes=int(ITEM_BYTES[dtype]))
    return StagePlan(
        **common, devices=engines * size, device_parts=parts, device_limit_bytes=memory,
        host_parts={"processes": GPU_PROCESS_BYTES * engines * size}, host_limit_bytes=hardware.host_memory_bytes,
        seconds=common["flops"] / (engines * size * hardware.rate("extract", dtype)),
        settings={
            "backend": "vllm", "tensor_parallel_size": size, "engines": engines, "max_num_batched_tokens": step,
            "gpu_memory_utilization": utilization, "dtype": dtype,
        },
        refused=refused, changes=changes,
    )  # fmt: skip


def _asked_for_too_much(config: ExtractConfig, hardware: Hardware, group: int) -> tuple[str, tuple[str, ...]]:
    """Return why fusechat.extract.backend would refuse the engines that are asked for, and what to ask for instead."""
    if (config.engines or 1) * group <= hardware.devices:
        return "", ()
    refused = f"{config.engines or 1} × {group} GPUs asked for, {hardware.devices} there"
    possible = hardware.devices // group
    return refused, (f"extract.engines: {possible}",) if possible else ()


def _changes(shape: ModelShape, config: ExtractConfig, hardware: Hardware, size: int) -> tuple[str, ...]:
    """Name what makes a model fit that does not: more GPUs an engine, fewer bytes a weight, or another machine."""
    gpus, memory = hardware.devices, hardware.memory_bytes
    elsewhere = "extract.backend: vllm-server, where it runs elsewhere"
    larger = smallest_size(shape, config, gpus, memory)
    if larger is not None and larger != size:
        return (f"extract.tensor_parallel_size: {larger}",)
    for smaller in ("fp8", "int4"):
        least = smallest_size(shape, config, gpus, memory, quantised_to=smaller)
        if least is not None:
            return f"its model to one quantised to {smaller}, on {least} GPU" + "s" * (least > 1), elsewhere
    return (elsewhere,)
