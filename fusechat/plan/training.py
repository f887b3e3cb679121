"""What training one target takes, by how its state is spread over the GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusechat.config import LoraConfig, TrainConfig
from fusechat.plan.extraction import HEAP_BLOCK_BYTES
from fusechat.plan.hardware import Hardware
from fusechat.plan.model_shape import (
    ITEM_BYTES,
    ModelShape,
    count_parameters,
    embedding_parameters,
    layer_parameters,
    stored_bytes,
    training_flops,
)
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths

_CUDA_BYTES = 1_500_000_000  # context, NCCL's buffers, cuBLAS's workspaces
_FRAGMENTATION = 0.05  # of what torch's caching allocator hands out
# Bytes of state a parameter has in an optimizer, by the end of its Trainer name.
_OPTIMIZER_BYTES = {"8bit": 2.0, "4bit": 1.0, "adafactor": 0.02, "sgd": 0.0, "galore": 1.0, "lion": 4.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How weights, gradients and optimizer state are spread: `True` means divided by the number of GPUs."""

    name: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    offload: bool = False
    """Weights, gradients and optimizer state live on the host."""


STRATEGIES = (
    Strategy(name="ddp"),
    Strategy(name="zero1", optimizer=True),
    Strategy(name="zero2", optimizer=True, gradients=True),
    Strategy(name="fsdp2", optimizer=True, gradients=True, weights=True),
    Strategy(name="fsdp2+offload", optimizer=True, gradients=True, weights=True, offload=True),
)


def optimizer_bytes_per_parameter(name: str) -> float:
    """Return the optimizer state of one parameter under a name of transformers' Trainer; Adam's 8 where unknown."""
    return next((size for part, size in _OPTIMIZER_BYTES.items() if part in name), 8.0)


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Return the adapters' parameters on every linear layer but the head (peft's `all-linear`)."""
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 2 * (shape.hidden + query) + 2 * (shape.hidden + key)
    mlp = 3 * (shape.hidden + shape.intermediate) * shape.experts
    return shape.layers * rank * (attention + mlp)


def activation_bytes(shape: ModelShape, tokens: int, *, item: int, checkpointing: bool, mask_tokens: int = 0) -> int:
    """Return what a forward pass keeps for the backward pass.

    A layer keeps per token: both norms' inputs and normalised values in float32 (4 D), their outputs, the rotated query
    and the attention's output (4 D) with keys and values, and four widths of a gated MLP. Under a padding mask
    (`mask_tokens`, a sequence's length) keys and values are widened to all heads and every layer keeps its mask. With
    checkpointing only each layer's input is kept, and one layer's all.
    """
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 4 * shape.hidden * 4
    keys = 2 * (query if mask_tokens else key)
    inside = (
        2 * shape.hidden + 2 * query + keys + 4 * shape.intermediate * shape.experts_per_token + mask_tokens
    ) * item
    layer = tokens * (norms + inside)
    ends = tokens * 3 * shape.hidden * 4
    if checkpointing:
        return shape.layers * tokens * shape.hidden * item + layer + ends
    return shape.layers * layer + ends


def loss_bytes(shape: ModelShape, rows: int, config: TrainConfig, *, item: int, weight_grad: bool) -> int:
    """Return what the fusion loss holds: a chunk of logits, dW and its float32 sum, and the gradient of the states."""
    import torch

    from fusechat.loss.plan import accumulator_bytes, plan_chunk_rows

    dtype = {2: torch.bfloat16, 4: torch.float32}[item]
    weight = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device="meta")
    chunk = plan_chunk_rows(
        rows, weight, weight_grad=weight_grad, logits_bytes=item, budget_bytes=config.loss_budget_bytes
    )
    several = accumulator_bytes(weight, weight_grad) if rows > chunk else 0
    own = embedding_parameters(shape) * item * weight_grad
    copy = embedding_parameters(shape) * item if item == 2 else 0  # the head in the forward pass's dtype
    return min(chunk, rows) * shape.vocab * item + several + own + copy + 2 * rows * shape.hidden * item


def device_parts(
    shape: ModelShape, config: TrainConfig, strategy: Strategy, gpus: int, tokens: int, mask_tokens: int, rows: int
) -> dict[str, int]:
    """Return what one GPU holds at the peak of a step: float32 master weights, their gradients and Adam's state, what
    is gathered or cast of them in the forward pass's dtype, activations and the loss."""
    n = count_parameters(shape)
    trained = _trained(shape, config)
    item = int(ITEM_BYTES[config.dtype])
    share = {key: gpus if getattr(strategy, key) else 1 for key in ("weights", "gradients", "optimizer")}
    narrow = {"4bit": "int4", "8bit": "int8"}
    kept = 4 * n if config.quantization is None else stored_bytes(shape, narrow[config.quantization])
    adapters = 0 if config.lora is None else 4 * trained
    parts = {
        "weights": int(kept / share["weights"] + adapters),
        "gradients": int(4 * trained / share["gradients"]),
        "optimizer": int(optimizer_bytes_per_parameter(config.optimizer) * trained / share["optimizer"]),
    }
    if strategy.offload:
        parts = dict.fromkeys(parts, 0)
    if strategy.weights:
        # One layer computes while the next one's weights arrive; embedding and head are gathered as a whole.
        gathered = 2 * layer_parameters(shape) + embedding_parameters(shape) * (1 if shape.tied else 2)
        parts["gathered"] = gathered * item + layer_parameters(shape) * 4
    elif item == 2:
        parts["casts"] = n * item  # autocast keeps its copies for the backward pass
    parts["activations"] = activation_bytes(
        shape, tokens, item=item, checkpointing=config.gradient_checkpointing, mask_tokens=mask_tokens
    )
    parts["loss"] = loss_bytes(shape, rows, config, item=item, weight_grad=config.lora is None)
    parts["fragmentation"] = int(_FRAGMENTATION * sum(parts.values()))
    parts["cuda"] = _CUDA_BYTES
    return parts


def cpu_parts(shape: ModelShape, lengths: Lengths, config: TrainConfig, process_bytes: int) -> dict[str, int]:
    """Return what training holds on the CPU at its peak: the start of a backward pass over the longest micro-batch."""
    n = count_parameters(shape)
    trained = _trained(shape, config)
    item = int(ITEM_BYTES[config.dtype])
    tokens, mask_tokens = _micro_batch(lengths, config)
    rows = int(tokens * lengths.row_share)
    temporaries = tokens * (3 * shape.intermediate + 3 * shape.hidden) * item
    heap = temporaries if tokens * shape.intermediate * item < HEAP_BLOCK_BYTES else 0
    accumulates = config.batch_size > config.micro_batch_size
    return {
        "process": process_bytes,
        "weights": 4 * n + 4 * trained * (config.lora is not None) + (item * n if item == 2 else 0),
        "gradients": 4 * trained * accumulates,
        "optimizer": int(optimizer_bytes_per_parameter(config.optimizer) * trained),
        "activations": activation_bytes(
            shape, tokens, item=item, checkpointing=config.gradient_checkpointing, mask_tokens=mask_tokens
        ),
        "backward": temporaries,
        "loss": loss_bytes(shape, rows, config, item=item, weight_grad=config.lora is None),
        "kept by the heap": heap,
    }


def plan_training(
    name: str,
    shape: ModelShape,
    lengths: Lengths,
    config: TrainConfig,
    hardware: Hardware,
    process_bytes: int,
) -> tuple[StagePlan, Mapping[str, int]]:
    """Return what training a target takes, and the bytes a GPU needs under every strategy.

    The plan is of the first strategy that fits, in the order of their communication; the last one where none does.
    """
    padded = 1.0 if config.packing else lengths.padded_share(config.micro_batch_size)
    frozen = config.lora is not None
    steps = config.max_steps if config.max_steps > 0 else math.ceil(
        math.ceil(lengths.n_dialogues / config.batch_size) * config.epochs
    )  # fmt: skip
    seen = min(steps * config.batch_size / lengths.n_dialogues, config.epochs)
    flops = seen * training_flops(shape, lengths.tokens, lengths.typical, lengths.rows, frozen=frozen)
    done = seen * training_flops(shape, lengths.tokens * padded, lengths.typical, lengths.rows, frozen=frozen)
    done *= (4 / 3 if not frozen else 3 / 2) if config.gradient_checkpointing else 1.0
    trained = _trained(shape, config)
    checkpoints = int(2 * trained * (4 + optimizer_bytes_per_parameter(config.optimizer)))
    common: dict[str, Any] = {
        "stage": "train", "name": name, "parameters": count_parameters(shape), "flops": flops,
        "disk_parts": {"target": stored_bytes(shape)}, "temporary_disk_parts": {"two checkpoints": checkpoints},
    }  # fmt: skip
    facts = {"steps": steps, "padded_share": round(padded, 3), "dtype": config.dtype}

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
        settings=facts | ({"strategy": need.strategy} if gpus else {}),
        changes=() if need.fits(hardware) else _changes(config, hardware, needs),
    )
    return plan, need.strategies


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
    tokens, mask_tokens = _micro_batch(lengths, config)
    gpus = hardware.devices
    possible = [s for s in STRATEGIES if gpus > 1 or not s.optimizer or s.offload]
    table = {
        s.name: device_parts(shape, config, s, gpus, tokens, mask_tokens, int(tokens * lengths.row_share))
        for s in possible
    }
    sizes = {name: sum(parts.values()) for name, parts in table.items()}
    chosen = next((s for s in possible if sizes[s.name] <= hardware.memory_bytes), possible[-1])
    # Every process reads the whole pivot in float32 before it is divided.
    host = {"processes": process_bytes * gpus, "loading": 4 * count_parameters(shape) * gpus}
    if chosen.offload:
        # The shards stay where they were loaded; the rest of what was read goes.
        host["offloaded state"] = int(_trained(shape, config) * (4 + optimizer_bytes_per_parameter(config.optimizer)))
    return Needs(device_parts=table[chosen.name], host_parts=host, strategy=chosen.name, strategies=sizes)


def _changes(config: TrainConfig, hardware: Hardware, needs: Callable[[TrainConfig], Needs]) -> tuple[str, ...]:
    """Name the settings that make it fit, in the order in which they are given up, or what is left to do."""
    candidates: list[tuple[str, dict[str, object]]] = [
        ("train.gradient_checkpointing: true", {"gradient_checkpointing": True}),
        ("train.micro_batch_size: 1", {"micro_batch_size": 1}),
        ("train.dtype: bfloat16", {"dtype": "bfloat16"}),
        ("train.loss_budget_bytes: 134217728", {"loss_budget_bytes": 134_217_728}),
        ("train.optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}),
        ("train.lora: {rank: 16}", {"lora": LoraConfig()}),
    ]
    taken: list[str] = []
    for text, update in candidates:
        if hardware.on_cpu and "dtype" in update:
            continue  # autocast's copies cost the CPU more than its activations save
        if all(getattr(config, key) == value for key, value in update.items()):
            continue
        config = config.model_copy(update=update)
        taken.append(text)
        if needs(config).fits(hardware):
            return (" and ".join(taken),)
    return (f"{' and '.join(taken)}, which is not enough: more GPUs, or more host memory",)


def _micro_batch(lengths: Lengths, config: TrainConfig) -> tuple[int, int]:
    """Return the tokens of the largest micro-batch, and the length its attention mask spans (0: no mask is kept)."""
    longest = lengths.longest
    if not config.packing:
        tokens, spanned = config.micro_batch_size * longest, longest
    else:
        tokens = spanned = max(longest, config.micro_batch_size * round(lengths.tokens / lengths.n_dialogues))
    return tokens, 0 if config.attention in ("flash_attention_2", "flex_attention") else spanned


def _trained(shape: ModelShape, config: TrainConfig) -> int:
    return count_parameters(shape) if config.lora is None else lora_parameters(shape, config.lora.rank)
