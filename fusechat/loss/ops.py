"""The fusion loss as torch custom operators, so that `torch.compile(fullgraph=True)` takes it as one opaque
step.

Both return the loss, what `LossOutput` returns per row, and the gradients at an upstream gradient of one,
empty where none is wanted. Eager code calls their bodies directly, to work in place.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fusechat.loss.backend import backend_for, forward_rows
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import Rows
from fusechat.loss_chunks import plan_chunk_rows, row_stride

_ROWS_SCHEMA = (
    "Tensor labels, Tensor ids, Tensor logprobs, Tensor hard_weight, Tensor row_scale, Tensor partition, "
    "Tensor? order, Tensor? low, Tensor? high"
)
_OPTIONS_SCHEMA = (
    "str divergence, str missing, float temperature, float student_temperature, float beta, float label_smoothing, "
    "float z_loss, float softcap"
)
_N_ROWS_ARGUMENTS = 9


def options_of(arguments: tuple[Any, ...]) -> LossOptions:
    """Return the options that were flattened into operator arguments."""
    *scalars, softcap = arguments
    return LossOptions(**dict(zip((field.name for field in fields(LossOptions)), (*scalars, softcap or None))))


def logits_loss(logits: Tensor, rows: Rows, options: LossOptions, grad: Tensor | None) -> tuple[Tensor, ...]:
    """Return loss, hard, soft, lse, correct, and write the gradient to `grad` if given."""
    row_loss, hard, soft, lse, correct = forward_rows(logits, rows, options, grad)
    return (row_loss * rows.row_scale).sum(), hard, soft, lse, correct


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    rows: Rows,
    options: LossOptions,
    budget_bytes: int | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Return loss, hard, soft, lse, correct and the gradients of hidden, weight and bias, empty unless wanted.

    `kept` are the rows whose label counts: only they go through the products, which are nearly all of the work.
    """
    want_hidden, want_weight, want_bias = wanted
    n_rows, (vocabulary, width) = hidden.shape[0], weight.shape
    kept = rows.counting() if kept is None else kept
    n_kept = kept.numel()
    chunk_rows = plan_chunk_rows(
        n_kept, vocabulary, width, weight_bytes=weight.element_size(), weight_grad=want_weight,
        logits_bytes=hidden.element_size(), budget_bytes=budget_bytes,
    )  # fmt: skip
    several = n_kept > chunk_rows
    buffer = hidden.new_empty(min(chunk_rows, n_kept), row_stride(vocabulary))[:, :vocabulary]
    d_hidden = torch.zeros_like(hidden) if want_hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(0)
    if want_weight:
        # A single product overwrites it, several add to it.
        d_weight = (
            torch.empty_like(weight) if 0 < n_kept <= chunk_rows else torch.zeros_like(weight, dtype=torch.float32)
        )
    d_bias = hidden.new_zeros(vocabulary if want_bias else 0, dtype=torch.float32)
    row_loss, hard, soft, lse = (hidden.new_zeros(n_rows, dtype=torch.float32) for _ in range(4))
    correct = torch.zeros(n_rows, dtype=torch.bool, device=hidden.device)

    # Autocast would change the type of some of the products: not of those that are written to a buffer.
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n_kept, chunk_rows):
            index = kept[start : start + chunk_rows]
            h = hidden.index_select(0, index)
            logits = torch.mm(h, weight.t(), out=buffer[: index.numel()])
            if bias is not None:
                logits += bias
            values = forward_rows(logits, rows.take(index), options, logits if any(wanted) else None)
            for column, value in zip((row_loss, hard, soft, lse, correct), values):
                column.index_copy_(0, index, value)
            # From here on the buffer holds the gradient of the logits.
            if want_hidden:
                d_hidden.index_copy_(0, index, logits @ weight)
            if want_weight and several:
                _add_product(d_weight, logits.t(), h)
            elif want_weight:
                torch.mm(logits.t(), h, out=d_weight)
            if want_bias:
                d_bias += logits.sum(0, dtype=torch.float32)

    d_bias = d_bias.to(bias.dtype) if want_bias and bias is not None else d_bias
    return (row_loss * rows.row_scale).sum(), hard, soft, lse, correct, d_hidden, d_weight.to(weight.dtype), d_bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to an fp32 total; on a GPU the product of two-byte floats never leaves fp32."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient in place by the upstream gradient; a factor of one costs no pass, and no wait for the
    device."""
    if factor.device.type == "cpu" and bool(factor == 1):
        return gradient
    on_device = factor.device.type != "cpu" and backend_for(gradient.device) == "triton"
    if on_device and gradient.ndim == 2 and gradient.stride(1) == 1:
        from fusechat.kernels.scale import scale_rows_

        scale_rows_(gradient, factor)
        return gradient
    return gradient.mul_(factor)


@torch.library.custom_op(
    "fusechat::sparse_soft_ce",
    mutates_args=(),
    schema=f"(Tensor logits, {_ROWS_SCHEMA}, {_OPTIONS_SCHEMA}, bool want_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def sparse_soft_ce_op(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the loss of logits and, if wanted, their gradient in new memory."""
    rows, options = Rows(*arguments[:_N_ROWS_ARGUMENTS]), options_of(arguments[_N_ROWS_ARGUMENTS:-1])
    grad = torch.empty_like(logits) if arguments[-1] else None
    values = logits_loss(logits, rows, options, grad)
    return (*values, logits.new_empty(0) if grad is None else grad)


@sparse_soft_ce_op.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    grad = torch.empty_like(logits) if arguments[-1] else logits.new_empty(0)
    return (*_fake_outputs(logits), grad)


@torch.library.custom_op(
    "fusechat::linear_sparse_soft_ce",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor? kept, {_ROWS_SCHEMA}, {_OPTIONS_SCHEMA}, "
    "int? budget_bytes, bool want_hidden, bool want_weight, bool want_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_sparse_soft_ce_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    """Compute the loss from hidden states, and the gradients that are wanted."""
    rows = Rows(*arguments[:_N_ROWS_ARGUMENTS])
    options = options_of(arguments[_N_ROWS_ARGUMENTS:-4])
    return linear_loss(hidden, weight, bias, kept, rows, options, arguments[-4], arguments[-3:])


@linear_sparse_soft_ce_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    want_hidden, want_weight, want_bias = arguments[-3:]
    return (
        *_fake_outputs(hidden),
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
        torch.empty_like(bias) if want_bias and bias is not None else hidden.new_empty(0, dtype=torch.float32),
    )


def _fake_outputs(rows_like: Tensor) -> tuple[Tensor, ...]:
    n_rows = rows_like.shape[0]
    columns = [rows_like.new_empty(n_rows, dtype=torch.float32) for _ in range(3)]
    return (rows_like.new_empty((), dtype=torch.float32), *columns, rows_like.new_empty(n_rows, dtype=torch.bool))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[5:])
    ctx.n_inputs = len(inputs)


def _hand_out_gradients(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    gradients = [g * upstream[0] if g.numel() else None for g in ctx.saved_tensors]
    return (*gradients, *([None] * (ctx.n_inputs - len(gradients))))


sparse_soft_ce_op.register_autograd(_hand_out_gradients, setup_context=_keep_gradients)
linear_sparse_soft_ce_op.register_autograd(_hand_out_gradients, setup_context=_keep_gradients)
