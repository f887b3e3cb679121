"""What scoring models in bits per byte takes: one after another on one device, all dialogues of a model at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fusechat.config import ExtractConfig
from fusechat.extract.tensor_parallel import computed_in
from fusechat.model_shape import ModelShape, count_parameters, forward_flops, stored_bytes
from fusechat.plan.extraction import hf_parts, on_device
from fusechat.plan.hardware import Hardware
from fusechat.plan.process import GPU_PROCESS_BYTES
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths


def scoring_work(
    shape: ModelShape, lengths: Lengths, n_dialogues: int, config: ExtractConfig, hardware: Hardware
) -> tuple[float, float]:
    """Return the operations and the seconds of scoring a model on so many dialogues."""
    tokens = n_dialogues * lengths.tokens / lengths.n_dialogues
    flops = forward_flops(shape, tokens, lengths.typical, tokens * lengths.row_share)
    return flops, flops / hardware.rate("extract", computed_in(shape, config))


def scoring_parts(
    shape: ModelShape, lengths: Lengths, n_dialogues: int, config: ExtractConfig, process_bytes: int
) -> dict[str, int]:
    """Return what scoring holds at its peak: extraction's parts, all dialogues in one shard, one entry a row."""
    one_shard = config.model_copy(update={"shard_dialogues": n_dialogues, "top_k": 1})
    return hf_parts(shape, replace(lengths, n_dialogues=n_dialogues), one_shard, process_bytes)


def plan_evaluation(
    models: Mapping[str, tuple[ModelShape, Lengths]], n_held_out: int, config: ExtractConfig, hardware: Hardware,
    base_bytes: int,
) -> StagePlan:  # fmt: skip
    """Return what scoring every model on the held-out dialogues takes."""
    work = [scoring_work(shape, lengths, n_held_out, config, hardware) for shape, lengths in models.values()]
    flops, seconds = map(sum, zip(*work))
    name, (shape, lengths) = max(models.items(), key=lambda item: stored_bytes(item[1][0]))
    parts = scoring_parts(shape, lengths, n_held_out, config, base_bytes)
    common = {"stage": "evaluate", "name": "all", "parameters": count_parameters(shape), "flops": flops}
    common |= {"seconds": seconds, "settings": {"largest": name}}
    changes = ["a smaller extract.batch_tokens"]
    if name != "pivot":  # targets and the merge are as large as it, and come after it
        changes.append(f"eval.sources: false, since one device does not hold {name}")
    if hardware.on_cpu:
        return StagePlan(
            **common, devices=0, host_parts=parts, host_limit_bytes=hardware.memory_bytes,  # type: ignore[arg-type]
            changes=tuple(changes),
        )  # fmt: skip
    return StagePlan(
        **common, devices=1, device_parts=on_device(parts, shape, config), device_limit_bytes=hardware.memory_bytes,  # type: ignore[arg-type]
        host_parts={"process": GPU_PROCESS_BYTES}, host_limit_bytes=hardware.host_memory_bytes,
        changes=tuple(changes),
    )  # fmt: skip
