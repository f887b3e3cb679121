"""The memory of a training step: what every parameter, token and row costs, on one GPU or on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from fusechat.loss_chunks import accumulator_bytes, plan_chunk_rows, row_stride
from fusechat.model_shape import (
    ITEM_BYTES,
    ModelShape,
    count_parameters,
    embedding_parameters,
    layer_parameters,
    stored_bytes,
)
from fusechat.plan.extraction import HEAP_BLOCK_BYTES
from fusechat.plan.workload import Lengths
from fusechat.train_config import TrainConfig

# DeepSpeed collects gradients, and updated weights, in a bucket of 5e8 elements each (its defaults).
_BUCKET_ELEMENTS = 2 * 500_000_000
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
    deepspeed: bool = False
    """Weights and gradients are of the forward pass's dtype; their float32 copies are spread with the optimizer."""


STRATEGIES = (
    Strategy(name="ddp"),
    Strategy(name="fsdp2", optimizer=True, gradients=True, weights=True),
    Strategy(name="fsdp2+offload", optimizer=True, gradients=True, weights=True, offload=True),
    Strategy(name="zero1", optimizer=True, deepspeed=True),
    Strategy(name="zero2", optimizer=True, gradients=True, deepspeed=True),
    Strategy(name="zero3", optimizer=True, gradients=True, weights=True, deepspeed=True),
)


def optimizer_bytes_per_parameter(name: str) -> float:
    """Return the optimizer state of one parameter under a name of transformers' Trainer; Adam's 8 where unknown."""
    return next((size for part, size in _OPTIMIZER_BYTES.items() if part in name), 8.0)


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Return the adapters' parameters on every linear layer but the head (peft's `all-linear`)."""
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 2 * (shape.hidden + query) + 2 * (shape.hidden + key)
    mlp = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate) * shape.experts
    return shape.layers * rank * (attention + mlp)


def activation_bytes(shape: ModelShape, tokens: int, *, item: int, checkpointing: bool, mask_tokens: int = 0) -> int:
    """Return what a forward pass keeps for the backward pass.

    A layer keeps per token: both norms' inputs and normalised values in float32 (4 D), their outputs, the rotated query
    and the attention's output (4 D) with keys and values, and four widths of a gated MLP. Under a padding mask
    (`mask_tokens`, the length it spans) keys and values are widened to all heads and every layer keeps its mask. With
    checkpointing only each layer's input is kept, and one layer's all.
    """
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 4 * shape.hidden * 4
    keys = 2 * (query if mask_tokens else key)
    inside = (
        2 * shape.hidden
        + 2 * query
        + keys
        + shape.mlp_widths_kept * shape.intermediate * shape.experts_per_token
        + mask_tokens
    ) * item
    layer = tokens * (norms + inside)
    ends = tokens * 3 * shape.hidden * 4
    if checkpointing:
        return shape.layers * tokens * shape.hidden * item + layer + ends
    return shape.layers * layer + ends


def loss_bytes(shape: ModelShape, rows: int, config: TrainConfig, *, item: int, weight_grad: bool) -> int:
    """Return what the fusion loss holds: a chunk of logits, dW and its float32 sum, and the gradient of the states."""
    vocab, width = shape.vocab, shape.hidden
    chunk = plan_chunk_rows(
        rows, vocab, width, weight_bytes=item, weight_grad=weight_grad, logits_bytes=item,
        budget_bytes=config.loss_budget_bytes,
    )  # fmt: skip
    several = accumulator_bytes(vocab, width, weight_bytes=item, weight_grad=weight_grad) if rows > chunk else 0
    own = embedding_parameters(shape) * item * weight_grad
    copy = embedding_parameters(shape) * item if item == 2 else 0  # the head in the forward pass's dtype
    return min(chunk, rows) * row_stride(vocab) * item + several + own + copy + 2 * rows * width * item


def device_parts(
    shape: ModelShape, config: TrainConfig, strategy: Strategy, gpus: int, tokens: int, mask_tokens: int, rows: int
) -> dict[str, int]:
    """Return what one GPU holds at the peak of a step: master weights, their gradients and Adam's state, what is
    gathered or cast of them in the forward pass's dtype, activations and the loss."""
    n = count_parameters(shape)
    trained = trained_parameters(shape, config)
    item = int(ITEM_BYTES[config.dtype])
    share = {key: gpus if getattr(strategy, key) else 1 for key in ("weights", "gradients", "optimizer")}
    width, master = (item, 4) if strategy.deepspeed else (4, 0)
    narrow = {"4bit": "int4", "8bit": "int8"}
    kept = width * n if config.quantization is None else stored_bytes(shape, narrow[config.quantization])
    adapters = 0 if config.lora is None else width * trained
    state = optimizer_bytes_per_parameter(config.optimizer) + master
    parts = {
        "weights": int(kept / share["weights"] + adapters),
        "gradients": int(width * trained / share["gradients"]),
        "optimizer": int(state * trained / share["optimizer"]),
    }
    if strategy.offload:
        parts = dict.fromkeys(parts, 0)
    if strategy.weights:
        # One layer computes while the next one's weights arrive; embedding and head are gathered as a whole.
        gathered = 2 * layer_parameters(shape) + embedding_parameters(shape) * (1 if shape.tied else 2)
        parts["gathered"] = gathered * item + layer_parameters(shape) * width
    elif item == 2 and not strategy.deepspeed:
        parts["casts"] = n * item  # autocast keeps its copies for the backward pass
    if strategy.deepspeed:
        parts["buckets"] = min(_BUCKET_ELEMENTS, 2 * trained) * item
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
    trained = trained_parameters(shape, config)
    item = int(ITEM_BYTES[config.dtype])
    tokens, mask_tokens = micro_batch(lengths, config)
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


def micro_batch(lengths: Lengths, config: TrainConfig) -> tuple[int, int]:
    """Return the tokens of the largest micro-batch, and the length its attention mask spans (0: no mask is kept)."""
    longest = lengths.longest
    if not config.packing:
        tokens, spanned = config.micro_batch_size * longest, longest
    else:
        tokens = spanned = max(longest, config.micro_batch_size * round(lengths.tokens / lengths.n_dialogues))
    return tokens, 0 if config.attention in ("flash_attention_2", "flex_attention") else spanned


def trained_parameters(shape: ModelShape, config: TrainConfig) -> int:
    """Return the parameters that training moves: all, or the adapters'."""
    return count_parameters(shape) if config.lora is None else lora_parameters(shape, config.lora.rank)
