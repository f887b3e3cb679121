"""The fusion loss on logits: K sparse teacher entries a row, the gradient written in place of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fusechat.errors import ConfigError
from fusechat.loss.ops import logits_loss, scale_, sparse_soft_ce_op
from fusechat.loss.options import Divergence, LossOptions, Missing
from fusechat.loss.rows import Cells, LossOutput, Rows, check_rows


class _SparseSoftCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: Tensor, rows: Rows, options: LossOptions, inplace: bool
    ) -> tuple[Tensor, ...]:
        grad = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad = logits.detach() if inplace else torch.empty_like(logits)
        outputs = logits_loss(logits.detach(), rows, options, grad)
        if grad is not None and inplace:
            # Who kept the logits for a backward of its own must hear of it.
            torch.autograd.graph.increment_version(logits)
        ctx.grad = grad  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.grad  # type: ignore[attr-defined]
        if grad is None:
            raise RuntimeError("the loss's gradient was taken twice: it lives in the logits' memory and was handed out")
        ctx.grad = None  # type: ignore[attr-defined]
        return scale_(grad, grad_outputs[0]), None, None, None


def sparse_soft_ce(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    hard_weight: float | Tensor,
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
    inplace: bool = True,
) -> LossOutput:
    """Return λ · cross-entropy with the label + (1 − λ) · divergence from a sparse teacher, λ = hard_weight.

    Equal, for divergence ce with missing zero, to

        target = hard_weight·onehot(labels) + (1 − hard_weight)·Σ_k exp(logprobs_k)·onehot(ids_k)
        row_loss = −(target · log_softmax(logits)).sum(−1)
        loss = row_loss[labels ≠ −100].mean()

    without a dense target. With `inplace` the gradient, where one is needed, overwrites the logits' memory.

    Args:
        logits: float32, bfloat16 or float16 [N, V].
        labels: int64[N]; rows of −100 count for nothing and get a gradient of 0.
        ids: int64[N, K], the teacher's entries; −1 is absent, equal ids add up; K = 0 is plain cross-entropy. A row
            without entries has only its hard term, hard_weight times it.
        logprobs: float[N, K], the teacher's log-probabilities of these ids.
        hard_weight: λ, a float or float32[N].
        divergence: ce, kl, reverse_kl, jsd (beta), tvd, skew_kl (beta) or alpha (beta), over the K cells and
            the tail.
        missing: the teacher's mass outside its entries: `renormalise` scales the entries to sum to one (the
            paper's form), `tail` compares it with the student's mass there as one more cell, `zero` drops it,
            `uniform` spreads it.
        temperature: of the teacher. student_temperature: of the student in the soft term, which is multiplied
            by its square.
        label_smoothing: share of the label spread over the vocabulary. z_loss: weight of lse². softcap: of
            the logits.
        row_weight: float32[N]. Given, the loss is the weighted *sum* of rows, so that a caller's normaliser
            (tokens of the whole batch, gradient accumulation) costs no extra pass; without it, the mean over
            rows whose label is not −100.
        partition: bool[N], rows whose ids are cells of a partition of the vocabulary: their missing mass is
            always the tail's.
        cells: entries that are ranges of the byte-sorted vocabulary instead of single ids.

    Under torch.compile the gradient takes memory of its own whatever `inplace` says.

    Raises ConfigError for shapes, dtypes, devices and options that do not fit.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ConfigError(f"logits are {logits.dtype}{list(logits.shape)}, expected float[N, V]")
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
        labels, ids, logprobs, hard_weight, row_weight, partition, cells, shape=(logits.shape[0], logits.shape[1])
    )
    if labels.device != logits.device:
        raise ConfigError(f"logits are on {logits.device} and labels on {labels.device}: move them to one device")
    if torch.compiler.is_compiling():
        # The compiler owns the memory: it may not be told to overwrite an input of which it wants the
        # gradient.
        want_grad = torch.is_grad_enabled() and logits.requires_grad
        return LossOutput(*sparse_soft_ce_op(logits, *rows, *options.scalars().values(), want_grad)[:5])
    return LossOutput(*_SparseSoftCE.apply(logits, rows, options, inplace))  # type: ignore[no-untyped-call]
