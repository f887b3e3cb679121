"""What alignment, merging and evaluation take."""

from __future__ import annotations

from collections.abc import Mapping

from fusechat.align.cells import EXTRA_ENTRIES
from fusechat.config import AlignConfig, ExtractConfig
from fusechat.plan.extraction import hf_parts, on_device
from fusechat.plan.hardware import Hardware
from fusechat.plan.model_shape import ModelShape, count_parameters, forward_flops, stored_bytes
from fusechat.plan.process import GPU_PROCESS_BYTES
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths
from fusechat.store import id_dtype

# One thread of a 2-core Xeon (bench/results): `align, bytes, store to store`, and `sce` with five targets.
ALIGN_TOKENS_PER_S = 2.2e6
ALIGN_FIXED_S = 4.4
MERGE_S_PER_SOURCE_ELEMENT = 2.6e-9
_ALIGN_BYTES_PER_TOKEN = 5.0
_ALIGN_TABLE_BYTES = 1200  # per entry of the two vocabularies: byte strings, maps, statistics
_DIALOGUE_BYTES = 8 + 5 * 4 + 8  # index, five totals, an offset of the rows
_FINER_SHARE = 0.1  # rows whose prefix cells are stored, assumed


def plan_alignment(
    name: str,
    pivot: ModelShape,
    lengths: Lengths,
    source: ModelShape,
    top_k: int,
    config: AlignConfig,
    hardware: Hardware,
    base_bytes: int,
) -> StagePlan:
    """Return what aligning a source's store takes: it streams shards and holds the two vocabularies.

    `lengths` are in the pivot's tokens: an AlignedStore has one row for each of the pivot's, of `top_k` entries.
    """
    entry_bytes = id_dtype(pivot.vocab).itemsize + 2
    row_bytes: float = top_k * entry_bytes + 1 + 4
    dialogue_bytes, order_bytes = _DIALOGUE_BYTES, 0
    if config.granularity == "cells":
        row_bytes += _FINER_SHARE * (top_k + EXTRA_ENTRIES) * (entry_bytes + 4 + 4)
        dialogue_bytes += 8  # an offset of the cells
        order_bytes = 4 * pivot.vocab
    store = int(lengths.rows * row_bytes + lengths.n_dialogues * dialogue_bytes) + order_bytes
    return StagePlan(
        stage="align",
        name=name,
        parameters=count_parameters(source),
        devices=0,
        host_parts={
            "process": base_bytes,
            "vocabularies": _ALIGN_TABLE_BYTES * (pivot.vocab + source.vocab),
            "shards": int(_ALIGN_BYTES_PER_TOKEN * lengths.tokens),
        },
        host_limit_bytes=hardware.host_memory_bytes,
        disk_parts={"aligned store": store},
        seconds=ALIGN_FIXED_S + lengths.tokens / ALIGN_TOKENS_PER_S,
    )


def plan_merge(
    pivot: ModelShape, n_targets: int, threads: int, hardware: Hardware, base_bytes: int, method: str
) -> StagePlan:
    """Return what merging the targets takes: the engine's buffers, whatever the size of the model."""
    from fusechat.merge.estimate import engine_bytes

    elements = count_parameters(pivot)
    target_bytes = stored_bytes(pivot)
    computing = elements * (n_targets + 1) * MERGE_S_PER_SOURCE_ELEMENT / threads
    moving = target_bytes * (n_targets + 2) / hardware.disk_rate_bytes
    return StagePlan(
        stage="merge",
        name=method,
        parameters=elements,
        devices=0,
        host_parts={"process": base_bytes, "engine": engine_bytes(n_targets, threads)},
        host_limit_bytes=hardware.host_memory_bytes,
        disk_parts={"merged model": target_bytes},
        seconds=max(computing, moving),
        settings={"threads": threads, "bound_by": "disk" if moving > computing else "cores"},
    )


def plan_evaluation(
    models: Mapping[str, tuple[ModelShape, Lengths]], n_held_out: int, config: ExtractConfig, hardware: Hardware,
    base_bytes: int,
) -> StagePlan:  # fmt: skip
    """Return what scoring every model on the held-out dialogues takes: one model at a time, on one device."""
    flops = seconds = 0.0
    for shape, lengths in models.values():
        tokens = n_held_out * lengths.tokens / lengths.n_dialogues
        work = forward_flops(shape, tokens, lengths.typical, tokens * lengths.row_share)
        flops += work
        seconds += work / hardware.rate("extract", shape.dtype)
    name, (shape, lengths) = max(models.items(), key=lambda item: stored_bytes(item[1][0]))
    parts = hf_parts(shape, lengths, config, base_bytes)
    common = {"stage": "evaluate", "name": "all", "parameters": count_parameters(shape), "flops": flops}
    common |= {"seconds": seconds, "settings": {"largest": name}}
    mend = f"eval.sources: false, since one device does not hold {name}"
    if hardware.on_cpu:
        return StagePlan(
            **common, devices=0, host_parts=parts, host_limit_bytes=hardware.memory_bytes,  # type: ignore[arg-type]
            changes=("a smaller extract.batch_tokens", mend),
        )  # fmt: skip
    return StagePlan(
        **common, devices=1, device_parts=on_device(parts), device_limit_bytes=hardware.memory_bytes,  # type: ignore[arg-type]
        host_parts={"process": GPU_PROCESS_BYTES}, host_limit_bytes=hardware.host_memory_bytes,
        changes=(mend,),
    )  # fmt: skip
