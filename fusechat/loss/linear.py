"""The fusion loss from hidden states: lm_head in row chunks, never logits of all rows, gradients computed
with the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fusechat.errors import ConfigError
from fusechat.loss.ops import linear_loss, linear_sparse_soft_ce_op, scale_
from fusechat.loss.options import Divergence, LossOptions, Missing
from fusechat.loss.rows import Cells, LossOutput, Rows, check_rows


class _LinearSparseSoftCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor | None,
        rows: Rows,
        options: LossOptions,
        budget_bytes: int | None,
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        *outputs, d_hidden, d_weight, d_bias = linear_loss(
            hidden.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            kept,
            rows,
            options,
            budget_bytes,
            wanted,
        )
        ctx.grads = [g if want else None for g, want in zip((d_hidden, d_weight, d_bias), wanted)]  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads  # type: ignore[attr-defined]
        if grads is None:
            raise RuntimeError("the loss's gradient was taken twice: it was computed with the loss and handed out")
        ctx.grads = None  # type: ignore[attr-defined]
        return (*(None if g is None else scale_(g, grad_outputs[0]) for g in grads), None, None, None, None)


def linear_sparse_soft_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    hard_weight: float | Tensor,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
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
    cells: Cells | None = None,
) -> LossOutput:
    """Return `sparse_soft_ce(hidden @ weight.T + bias, …)` without logits of more than a chunk of rows.

    The gradients of hidden, weight and bias are computed together with the loss, each only if it is needed: a
    frozen lm_head costs no dW. Rows whose label is −100 are dropped before the products.

    Args:
        hidden: float[N, D]. weight: float[V, D] of the same dtype. bias: float[V].
        kept: int64[M], the rows whose label is not −100, in order. A collator that knows them saves a GPU the
            wait for their number.
        budget_bytes: the most memory to take beyond inputs and gradients; it sets the rows of a chunk.
            Default: as much as the weight takes in fp32, at least 256 MiB.

    The other arguments are `sparse_soft_ce`'s.

    Raises ConfigError for shapes, dtypes, devices and options that do not fit, and for a budget too small for one row.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ConfigError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}, expected [N, D] and [V, D]")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ConfigError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}, expected one floating dtype: under autocast give "
            "weight.to(hidden.dtype)"
        )
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
    rows = check_rows(
        labels, ids, logprobs, hard_weight, row_weight, partition, cells, shape=(hidden.shape[0], weight.shape[0])
    )
    if labels.device != hidden.device:
        raise ConfigError(f"hidden is on {hidden.device} and labels on {labels.device}: move them to one device")
    if torch.compiler.is_compiling():
        grad_on = torch.is_grad_enabled()
        wanted = [grad_on and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        scalars = options.scalars().values()
        return LossOutput(
            *linear_sparse_soft_ce_op(hidden, weight, bias, kept, *rows, *scalars, budget_bytes, *wanted)[:5]
        )
    return LossOutput(*_LinearSparseSoftCE.apply(hidden, weight, bias, kept, rows, options, budget_bytes))  # type: ignore[no-untyped-call]
