"""What training one target takes, by how its state is spread over the GPUs, and what to set when it does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusechat.errors import ConfigError
from fusechat.loss_chunks import accumulator_bytes
from fusechat.model_shape import ITEM_BYTES, ModelShape, count_parameters, stored_bytes, training_flops
from fusechat.plan.hardware import Hardware
from fusechat.plan.stage import StagePlan
from fusechat.plan.training_memory import (
    STRATEGIES,
    cpu_parts,
    device_parts,
    micro_batch,
    optimizer_bytes_per_parameter,
    trained_parameters,
)
from fusechat.plan.workload import Lengths
from fusechat.train_config import LoraConfig, TrainConfig

_LOSS_BUDGET_BYTES = 128 << 20  # of logits, where the loss's own budget is advised to be small


def plan_training(
    name: str,
    shape: ModelShape,
    lengths: Lengths,
    config: TrainConfig,
    hardware: Hardware,
    process_bytes: int,
) -> tuple[StagePlan, Mapping[str, int]]:
    """Return what training a target takes, and the bytes a GPU needs under every strategy.

    The plan is of the first of ddp, fsdp2 and fsdp2 with offload that fits, the last one where none does; DeepSpeed's
    are shown beside them.
    """
    padded = 1.0 if config.packing else lengths.padded_share(config.micro_batch_size)
    frozen = config.lora is not None
    if config.max_steps > 0:  # whatever `epochs` says
        steps = config.max_steps
        seen = steps * config.batch_size / lengths.n_dialogues
    else:
        steps = math.ceil(math.ceil(lengths.n_dialogues / config.batch_size) * config.epochs)
        seen = config.epochs
    flops = seen * training_flops(shape, lengths.tokens, lengths.typical, lengths.rows, frozen=frozen)
    done = seen * training_flops(shape, lengths.tokens * padded, lengths.typical, lengths.rows, frozen=frozen)
    done *= (4 / 3 if not frozen else 3 / 2) if config.gradient_checkpointing else 1.0
    trained = trained_parameters(shape, config)
    # A new one is written before the oldest goes.
    n_checkpoints = config.save_total_limit + 1
    checkpoints = int(n_checkpoints * trained * (4 + optimizer_bytes_per_parameter(config.optimizer)))
    common: dict[str, Any] = {
        "stage": "train", "name": name, "parameters": count_parameters(shape), "flops": flops,
        "disk_parts": {"target": stored_bytes(shape)},
        "temporary_disk_parts": {f"{n_checkpoints} checkpoints": checkpoints},
    }  # fmt: skip
    facts = {
        "steps": steps,
        "dtype": config.dtype,
        "padded_share": round(padded, 3),
        "tokens_per_dialogue": round(lengths.tokens / lengths.n_dialogues),
    }

    def needs(config: TrainConfig) -> Needs:
        return _needs(shape, lengths, config, hardware, process_bytes)

    need = needs(config)
    gpus = 0 if hardware.on_cpu else hardware.devices
    plan = StagePlan(
        **common,
        devices=gpus,
        device_parts=need.device_parts,
        device_limit_bytes=hardware.memory_bytes if gpus else 0,
        host_parts=need.host_parts,
        host_limit_bytes=hardware.host_memory_bytes,
        seconds=done / (max(gpus, 1) * hardware.rate("train", config.dtype)),
        settings=facts
        | ({"strategy": need.strategy, "launch": launch_words(need.strategy, gpus, config.dtype)} if gpus else {}),
        changes=() if need.fits(hardware) else _changes(shape, config, hardware, needs),
    )
    return plan, need.strategies


def launch_words(strategy: str, gpus: int, dtype: str) -> str:
    """Return the command that trains under one of our strategies, up to the name of the configuration."""
    if strategy == "ddp":
        return f"torchrun --nproc-per-node {gpus} -m fusechat run" if gpus > 1 else "fusechat run"
    recipe = f"fusechat/recipes/accelerate-{strategy.replace('+', '-')}.yaml"
    other = {"bfloat16": "", "float16": " --mixed_precision fp16"}.get(dtype, " --mixed_precision no")  # theirs is bf16
    return f"accelerate launch --config_file {recipe} --num_processes {gpus}{other} -m fusechat run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Memory of a configuration under the strategy that was chosen, and of a GPU under every strategy."""

    device_parts: Mapping[str, int]
    host_parts: Mapping[str, int]
    strategy: str
    strategies: Mapping[str, int]

    def fits(self, hardware: Hardware) -> bool:
        """Whether device and host hold it."""
        return (
            sum(self.device_parts.values()) <= hardware.memory_bytes
            and sum(self.host_parts.values()) <= hardware.host_memory_bytes
        )


def _needs(shape: ModelShape, lengths: Lengths, config: TrainConfig, hardware: Hardware, process_bytes: int) -> Needs:
    if hardware.on_cpu:
        parts = cpu_parts(shape, lengths, config, process_bytes)
        return Needs(device_parts={}, host_parts=parts, strategy="", strategies={})
    tokens, mask_tokens = micro_batch(lengths, config)
    gpus = hardware.devices
    possible = [s for s in STRATEGIES if gpus > 1 or not s.optimizer or s.offload]
    ours = [s for s in possible if not s.deepspeed]
    table = {
        s.name: device_parts(shape, config, s, gpus, tokens, mask_tokens, int(tokens * lengths.row_share))
        for s in possible
    }
    sizes = {name: sum(parts.values()) for name, parts in table.items()}
    chosen = next((s for s in ours if sizes[s.name] <= hardware.memory_bytes), ours[-1])
    # Every process reads the whole pivot in float32 before it is divided.
    host = {"processes": process_bytes * gpus, "loading": 4 * count_parameters(shape) * gpus}
    if chosen.offload:
        # The shards stay where they were loaded; the rest of what was read goes.
        host["offloaded state"] = int(
            trained_parameters(shape, config) * (4 + optimizer_bytes_per_parameter(config.optimizer))
        )
    return Needs(device_parts=table[chosen.name], host_parts=host, strategy=chosen.name, strategies=sizes)


def _changes(
    shape: ModelShape, config: TrainConfig, hardware: Hardware, needs: Callable[[TrainConfig], Needs]
) -> tuple[str, ...]:
    """Name the settings that make it fit, the first of them the least to give up, or what is left to do."""
    item = int(ITEM_BYTES[config.dtype]) if hardware.on_cpu else 2
    budget = _LOSS_BUDGET_BYTES + accumulator_bytes(shape.vocab, shape.hidden, weight_bytes=item, weight_grad=True)
    if config.loss_budget_bytes is not None:
        budget = min(budget, config.loss_budget_bytes)
    candidates: list[tuple[str, dict[str, object]]] = [
        ("train.gradient_checkpointing: true", {"gradient_checkpointing": True}),
        ("train.micro_batch_size: 1", {"micro_batch_size": 1}),
        ("train.dtype: bfloat16", {"dtype": "bfloat16"}),
        (f"train.loss_budget_bytes: {budget}", {"loss_budget_bytes": budget}),
        ("train.optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}),
        ("train.lora: {rank: 16}", {"lora": LoraConfig()}),
    ]
    taken: dict[str, dict[str, object]] = {}
    for text, update in candidates:
        if hardware.on_cpu and "dtype" in update:
            continue  # autocast's copies cost the CPU more than its activations save
        if all(getattr(config, key) == value for key, value in update.items()):
            continue
        fits = _fits_with(config, taken | {text: update}, hardware, needs)
        if fits is None:
            continue
        taken[text] = update
        if fits:
            break
    else:
        return (f"{' and '.join(taken)}, which is not enough: more GPUs, or more host memory",)
    for text in list(taken):
        fewer = {key: value for key, value in taken.items() if key != text}
        if _fits_with(config, fewer, hardware, needs):
            taken = fewer
    return (" and ".join(taken),)


def _fits_with(
    config: TrainConfig,
    updates: Mapping[str, Mapping[str, object]],
    hardware: Hardware,
    needs: Callable[[TrainConfig], Needs],
) -> bool | None:
    """Return whether it fits with the updates; None where the loss's budget is too small for them."""
    for update in updates.values():
        config = config.model_copy(update=update)
    try:
        return needs(config).fits(hardware)
    except ConfigError:
        return None
