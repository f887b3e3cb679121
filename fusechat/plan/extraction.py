"""What extracting one model's top-k takes: with vLLM, with transformers, or from servers elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusechat.config import ExtractConfig
from fusechat.extract.budget import GPU_MEMORY_UTILIZATION, max_batched_tokens, prompt_logprob_bytes
from fusechat.plan.hardware import Hardware, this_computer
from fusechat.plan.model_shape import (
    ITEM_BYTES,
    ModelShape,
    count_parameters,
    forward_flops,
    kv_bytes_per_token,
    stored_bytes,
)
from fusechat.plan.process import GPU_PROCESS_BYTES
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths
from fusechat.store import id_dtype

# glibc keeps a freed block below its largest mmap threshold in its heap, and cannot give it to the next aligned request
# of the same size: such buffers take their room twice (measured, docs/plan.md).
HEAP_BLOCK_BYTES = 32 << 20
HEAD_CHUNK_BYTES = 64 << 20  # fusechat.topk's own budget
_TOKEN_BYTES = 4 + 1 + 4 + 4  # in memory: input_ids, loss_mask, turn, byte_end
GOLD_AMONG_TOP = 0.9  # rows whose gold token is one of their k, k = 10 (docs/extraction.md); assumed for every model
_CUDA_BYTES = 1_000_000_000  # context and libraries
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
        return _with_vllm(common, shape, config, hardware, dtype)
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
    group = 1 if placed else config.tensor_parallel_size
    engines = 1 if placed else _engines(config, hardware, group)
    return StagePlan(
        **common, devices=engines * group, device_parts=on_device(parts), device_limit_bytes=hardware.memory_bytes,
        host_parts={"processes": engines * process_bytes}, host_limit_bytes=hardware.host_memory_bytes,
        settings=settings | {"engines": engines}, seconds=flops / (engines * hardware.rate("extract", dtype)),
        changes=("extract.backend: vllm", *changes),
    )  # fmt: skip


def _engines(config: ExtractConfig, hardware: Hardware, group: int) -> int:
    """Return how many engines of a group of GPUs each share the shards, as fusechat.extract.backend divides them."""
    return min(max(1, hardware.devices // group), config.engines or hardware.devices)


def computed_in(shape: ModelShape, config: ExtractConfig) -> str:
    """Return the dtype of the forward pass."""
    return shape.dtype if config.dtype == "auto" else config.dtype


def on_device(parts: Mapping[str, int]) -> dict[str, int]:
    """Return what of the transformers backend's parts lies on a GPU; its allocator reuses what a heap would keep."""
    return {key: parts[key] for key in ("weights", "forward", "logits")} | {"cuda": _CUDA_BYTES}


def gpu_parts(
    shape: ModelShape,
    max_length_tokens: int,
    memory_bytes: int,
    tensor_parallel: int,
    dtype: str,
    quantised_to: str | None = None,
) -> dict[str, int]:
    """Return what one GPU of an engine holds: its share of the weights, CUDA, the cache of one longest sequence, what a
    step's tokens take inside the layers, and what vLLM does not count: the logits and log-softmax of a step.

    `dtype` is the forward pass's; `quantised_to` tells how it would be with weights of fp8 or int4.
    """
    item = int(ITEM_BYTES[dtype])
    step = max_batched_tokens(shape.vocab, memory_bytes, dtype_bytes=item)
    kept = max(max_length_tokens + 1, step)
    width = 4 * shape.hidden + 3 * shape.intermediate // tensor_parallel
    as_stored = shape.quantisation is not None and quantised_to is None
    weights = stored_bytes(shape, None if as_stored else quantised_to or dtype)
    return {
        "weights": -(-weights // tensor_parallel),
        "kv cache": kept * kv_bytes_per_token(shape, item) // min(tensor_parallel, shape.kv_heads),
        "activations": step * width * item,
        "logits": prompt_logprob_bytes(step, shape.vocab, dtype_bytes=item),
        "cuda": _CUDA_BYTES,
    }


def hf_parts(shape: ModelShape, lengths: Lengths, config: ExtractConfig, process_bytes: int) -> dict[str, int]:
    """Return what the transformers backend holds at its peak on the CPU.

    Weights of the asked dtype are pages of their file, and of an untied embedding only the rows that occur are read.
    The widest moment of a layer is its MLP (three intermediate widths) or its attention; in half precision sequences
    are padded to batches, and under a mask keys and values are widened to all heads. Results are those of one shard.
    """
    from fusechat.extract.hf import length_batches

    dtype = computed_in(shape, config)
    item = int(ITEM_BYTES[dtype])
    in_file = dtype == shape.dtype or shape.quantisation is not None
    weights = stored_bytes(shape, None if in_file else dtype)
    unread = 0 if shape.tied or not in_file else (shape.vocab - min(shape.vocab, lengths.distinct_ids)) * shape.hidden
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
    chunk = min(rows, HEAD_CHUNK_BYTES // (shape.vocab * (item + 4)))
    forward = padded * width * item
    head = int(chunk * shape.vocab * (8 + (item if item < 4 else 0)))
    heap = forward * (padded * shape.intermediate * item < HEAP_BLOCK_BYTES)
    heap += head * (chunk * shape.vocab * 4 < HEAP_BLOCK_BYTES)
    row_bytes = config.top_k * 14 + 8
    mask = count * longest**2 * (1 + item) if count > 1 else 0
    return {
        "process": process_bytes,
        "weights": weights - unread * item,
        "forward": forward + mask + int(rows) * shape.hidden * item,
        "logits": head,
        "kept by the heap": int(heap),
        "results": int(n_held * lengths.tokens / lengths.n_dialogues * (_TOKEN_BYTES + lengths.row_share * row_bytes)),
    }


def _with_vllm(
    common: dict[str, Any], shape: ModelShape, config: ExtractConfig, hardware: Hardware, dtype: str
) -> StagePlan:
    limit = min(config.max_length_tokens, shape.context_tokens)
    wanted = config.tensor_parallel_size
    sizes = [n for n in (1, 2, 4, 8, 16) if wanted <= n <= hardware.devices and shape.heads % n == 0] or [wanted]

    def parts_of(tensor_parallel: int, quantised_to: str | None = None) -> dict[str, int]:
        return gpu_parts(shape, limit, hardware.memory_bytes, tensor_parallel, dtype, quantised_to)

    def fits(parts: dict[str, int]) -> bool:
        inside = sum(size for part, size in parts.items() if part not in ("logits", "cuda"))
        return (
            inside <= GPU_MEMORY_UTILIZATION * hardware.memory_bytes
            and sum(parts.values()) <= hardware.memory_bytes
        )  # fmt: skip

    chosen = next((n for n in sizes if fits(parts_of(n))), sizes[-1])
    parts = parts_of(chosen)
    engines = _engines(config, hardware, chosen)
    used = engines * chosen
    changes: list[str] = []
    if used > hardware.devices:
        changes.append(f"extract.tensor_parallel_size {chosen} asks for more than {hardware.devices} GPUs")
    if not fits(parts):
        for smaller in ("fp8", "int4"):
            least = next((n for n in sizes if fits(parts_of(n, smaller))), None)
            if least is not None:
                changes.append(f"its model to one quantised to {smaller}, on {least} GPU" + "s" * (least > 1))
                break
        changes.append("extract.backend: vllm-server, where it runs elsewhere")
    step = max_batched_tokens(shape.vocab, hardware.memory_bytes, dtype_bytes=int(ITEM_BYTES[dtype]))
    return StagePlan(
        **common, devices=used, device_parts=parts, device_limit_bytes=hardware.memory_bytes,
        host_parts={"processes": GPU_PROCESS_BYTES * used}, host_limit_bytes=hardware.host_memory_bytes,
        seconds=common["flops"] / (used * hardware.rate("extract", dtype)),
        settings={
            "backend": "vllm", "tensor_parallel_size": chosen, "engines": engines, "max_num_batched_tokens": step,
            "gpu_memory_utilization": GPU_MEMORY_UTILIZATION, "dtype": dtype,
        },
        changes=tuple(changes),
    )  # fmt: skip
