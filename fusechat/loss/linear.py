"""The fusion loss from hidden states: lm_head in row chunks, never logits of all rows, gradients computed
with the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fusechat.errors import ConfigError
from fusechat.loss.backend import forward_rows
from fusechat.loss.options import Divergence, LossOptions, Missing
from fusechat.loss.rows import IGNORE_LABEL, LossOutput, Rows, check_rows

# Rows of lm_head's product below which a GEMM wastes the machine.
_LEAST_DEFAULT_BYTES = 256 << 20


def plan_chunk_rows(
    n_rows: int, weight: Tensor, *, weight_grad: bool, logits_bytes: int, budget_bytes: int | None
) -> int:
    """Return how many rows of logits fit `budget_bytes`, which also holds the fp32 sum of dW when there are
    several chunks.

    Without a budget: as much as the weight takes in fp32, at least 256 MiB, since a training step holds that
        much for dW anyway. Raises ConfigError, naming the least budget that works.
    """
    vocabulary, width = weight.shape
    row_bytes = vocabulary * logits_bytes
    if budget_bytes is None:
        budget_bytes = max(vocabulary * width * 4, _LEAST_DEFAULT_BYTES) + accumulator_bytes(weight, weight_grad)
    if n_rows * row_bytes <= budget_bytes:
        return max(n_rows, 1)
    chunk_rows = (budget_bytes - accumulator_bytes(weight, weight_grad)) // row_bytes
    if chunk_rows < 1:
        least = row_bytes + accumulator_bytes(weight, weight_grad)
        raise ConfigError(
            f"budget_bytes is {budget_bytes}, too little for one row of logits and the sum of dW: give at least {least}"
        )
    return int(chunk_rows)


def accumulator_bytes(weight: Tensor, weight_grad: bool) -> int:
    """Return the size of the fp32 sum of dW that several chunks need beside the result: none where the result
    is fp32."""
    return weight.numel() * 4 if weight_grad and weight.dtype != torch.float32 else 0


class _LinearSparseSoftCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        options: LossOptions,
        budget_bytes: int | None,
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        hidden, weight = hidden.detach(), weight.detach()
        n_rows, vocabulary = hidden.shape[0], weight.shape[0]
        # Rows that do not count are dropped before the GEMMs, which are nearly all of the work.
        kept = (rows.labels != IGNORE_LABEL).nonzero().squeeze(1)
        chunk_rows = plan_chunk_rows(
            kept.numel(), weight, weight_grad=need_weight, logits_bytes=hidden.element_size(), budget_bytes=budget_bytes
        )
        several = kept.numel() > chunk_rows
        buffer = hidden.new_empty(min(chunk_rows, kept.numel()), vocabulary)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = (
            weight.new_zeros(weight.shape, dtype=torch.float32 if several else weight.dtype) if need_weight else None
        )
        d_bias = hidden.new_zeros(vocabulary, dtype=torch.float32) if need_bias else None
        row_loss, hard, soft, lse = (hidden.new_zeros(n_rows, dtype=torch.float32) for _ in range(4))
        correct = torch.zeros(n_rows, dtype=torch.bool, device=hidden.device)

        for start in range(0, kept.numel(), chunk_rows):
            index = kept[start : start + chunk_rows]
            h = hidden.index_select(0, index)
            logits = torch.mm(h, weight.t(), out=buffer[: index.numel()])
            if bias is not None:
                logits += bias.detach()
            chunk = Rows(*(column.index_select(0, index) for column in rows))
            values = forward_rows(
                logits, chunk, options, logits if any((need_hidden, need_weight, need_bias)) else None
            )
            for column, value in zip((row_loss, hard, soft, lse, correct), values):
                column.index_copy_(0, index, value)
            # From here on the buffer holds the gradient of the logits.
            if d_hidden is not None:
                d_hidden.index_copy_(0, index, logits @ weight)
            if d_weight is not None:
                if several:
                    d_weight += logits.t() @ h
                else:
                    torch.mm(logits.t(), h, out=d_weight)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=torch.float32)

        ctx.grads = (  # type: ignore[attr-defined]
            d_hidden,
            d_weight if d_weight is None else d_weight.to(weight.dtype),
            d_bias if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(hard, soft, lse, correct)
        return (row_loss * rows.row_scale).sum(), hard, soft, lse, correct

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads  # type: ignore[attr-defined]
        if grads is None:
            raise RuntimeError("the loss's gradient was taken twice: it was computed with the loss and handed out")
        ctx.grads = None  # type: ignore[attr-defined]
        d_hidden, d_weight, d_bias = (None if grad is None else grad.mul_(grad_outputs[0]) for grad in grads)
        return d_hidden, d_weight, d_bias, None, None, None


def linear_sparse_soft_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    hard_weight: float | Tensor,
    bias: Tensor | None = None,
    budget_bytes: int | None = None,
    divergence: Divergence = "ce",
    missing: Missing = "renormalise",
    temperature: float = 1.0,
    student_temperature: float = 1.0,
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weight: Tensor | None = None,
    partition: Tensor | None = None,
) -> LossOutput:
    """Return `sparse_soft_ce(hidden @ weight.T + bias, …)` without logits of more than a chunk of rows.

    The gradients of hidden, weight and bias are computed together with the loss, each only if it is needed: a
        frozen lm_head costs no dW. Rows whose label is −100 are dropped before the products.

    Args:
        hidden: float[N, D]. weight: float[V, D] of the same dtype. bias: float[V].
        budget_bytes: the most memory to take beyond inputs and gradients; it sets the rows of a chunk.
            Default: as much as the weight takes in fp32, at least 256 MiB.
        The others are `sparse_soft_ce`'s.

    Raises ConfigError for shapes, dtypes and options that do not fit, and for a budget too small for one row.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ConfigError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}, expected [N, D] and [V, D]")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ConfigError(f"hidden is {hidden.dtype} and weight {weight.dtype}, expected one floating dtype")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ConfigError(f"bias is {list(bias.shape)}, expected [{weight.shape[0]}]")
    options = LossOptions(
        divergence=divergence,
        missing=missing,
        temperature=temperature,
        student_temperature=student_temperature,
        beta=beta,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    rows = check_rows(hidden.shape[0], labels, ids, logprobs, hard_weight, row_weight, partition)
    return LossOutput(*_LinearSparseSoftCE.apply(hidden, weight, bias, rows, options, budget_bytes))  # type: ignore[no-untyped-call]
