"""The fusion loss on logits whose vocabulary is split over the ranks of a process group.

Two small transfers, maxima [N, 2] and sums with the label's and the K cells' logits [N, K + 7]: then every
rank holds the same loss, and writes the gradient of its own columns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fusechat.errors import ConfigError
from fusechat.kernels import reference
from fusechat.loss.backend import check_indices
from fusechat.loss.ops import scale_
from fusechat.loss.options import Divergence, LossOptions, Missing
from fusechat.loss.rows import LossOutput, Rows, check_rows


def _reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    dist.all_reduce(values, op, group)
    return values


def shard_loss(
    logits: Tensor,
    rows: Rows,
    options: LossOptions,
    first: int,
    vocabulary: int,
    group: dist.ProcessGroup | None,
    grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return row loss, hard, soft, lse and correct, and write row_scale · ∂loss/∂logits of this rank's
    columns to `grad`.

    `first` is the id of this rank's first column. A label or an id outside the vocabulary makes
    the row's loss NaN.
    """
    labels, ids, logprobs, hard_weight, row_scale, partition = rows[:6]
    n_local, n_entries = logits.shape[1], ids.shape[1]
    tau, maximum, total = options.student_temperature, dist.ReduceOp.MAX, dist.ReduceOp.SUM
    valid = labels != reference.IGNORE_LABEL
    # No rank owns an index outside the vocabulary: it would pass for absent.
    broken = (valid & ((labels < 0) | (labels >= vocabulary))) | (ids >= vocabulary).any(1)
    z = torch.where(valid.unsqueeze(1), logits.float(), 0.0)
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)

    p, is_cell, _ = reference.merge_duplicates(ids, torch.where(ids >= 0, logprobs, float("-inf")).exp())
    mine = is_cell & (ids >= first) & (ids < first + n_local)
    slot = torch.where(mine, ids - first, 0)
    label = torch.where(valid & (labels >= first) & (labels < first + n_local), labels - first, -1).unsqueeze(1)

    # Maxima over all columns and over the tail's, which is summed relative to its own.
    holes = torch.zeros_like(z, dtype=torch.int8).scatter_add_(1, slot, mine.to(torch.int8)) > 0
    rest = torch.where(holes, float("-inf"), z)
    tops = _reduce(torch.stack([z.amax(1), rest.amax(1)], 1), maximum, group)
    top = tops[:, :1]
    tail_top = tops[:, 1:].clamp(min=torch.finfo(torch.float32).min)
    # What one rank owns is zero on the others, so that a sum gathers it.
    own_label = torch.where(label >= 0, z.gather(1, label.clamp(min=0)) - top, 0.0)
    e_rest = torch.exp((rest - tail_top) / tau)
    counts = z != float("-inf")
    finite = torch.where(counts, z - top, 0.0)
    sums = [
        torch.exp(z - top).sum(1, keepdim=True),
        e_rest.sum(1, keepdim=True),
        own_label,
        finite.sum(1, keepdim=True),
        torch.where(holes, 0.0, finite).sum(1, keepdim=True),
        counts.sum(1, keepdim=True).float(),
        (counts & ~holes).sum(1, keepdim=True).float(),
        torch.where(mine, z.gather(1, slot) - top, 0.0),
    ]
    sum_z, sum_rest, z_label, total_z, total_rest, n_z, n_flat, z_k = torch.split(
        _reduce(torch.cat(sums, 1), total, group), [1, 1, 1, 1, 1, 1, 1, n_entries], 1
    )
    n_z = n_z.clamp(min=1).squeeze(1)
    lse_z = sum_z.log().squeeze(1)
    lse = top.squeeze(1) + lse_z
    smoothing = options.label_smoothing
    hard = lse_z - (1.0 - smoothing) * z_label.squeeze(1) - smoothing * total_z.squeeze(1) / n_z
    soft, soft_weight = torch.zeros_like(hard), torch.zeros_like(hard)

    if n_entries:
        n_rest = vocabulary - is_cell.sum(1)
        if options.missing == "uniform":
            n_rest = torch.where(partition, n_rest, n_flat.squeeze(1).long())
        log_sums = torch.cat([z_k / tau, (tail_top - top) / tau + sum_rest.log()], 1)
        soft, alpha, spread = reference.soft_from_cells(
            log_sums, p, is_cell, partition, n_rest, total_rest.squeeze(1) / tau,
            divergence=options.divergence, missing=options.missing, temperature=options.temperature,
            beta=options.beta,
        )  # fmt: skip
        active = is_cell.any(1)
        soft = torch.where(active, soft * tau * tau, 0.0)
        soft_weight = torch.where(active, 1.0 - hard_weight, 0.0)
    loss = hard_weight * hard + soft_weight * soft + options.z_loss * lse * lse
    loss = torch.where(broken, float("nan"), loss)

    if grad is not None:
        g = torch.exp(z - top).mul_(((hard_weight + 2.0 * options.z_loss * lse) / sum_z.squeeze(1)).unsqueeze(1))
        g -= torch.where(counts, (hard_weight * smoothing / n_z).unsqueeze(1), 0.0)
        if n_entries:
            tiny = torch.finfo(torch.float32).tiny
            part = e_rest.mul_(alpha[:, -1:] / sum_rest.clamp(min=tiny)).sub_(
                torch.where(counts & ~holes, spread.unsqueeze(1), 0.0)
            )
            part.scatter_add_(1, slot, torch.where(mine, alpha[:, :-1], 0.0))
            g += part.mul_((soft_weight * tau).unsqueeze(1))
        at_label = torch.where(label >= 0, (-(1.0 - smoothing) * hard_weight).unsqueeze(1), 0.0)
        g.scatter_add_(1, label.clamp(min=0), at_label)
        if options.softcap is not None:
            g *= reference.cap_slope(logits.float(), options.softcap)
        grad.copy_((g * row_scale.unsqueeze(1)).masked_fill_(~valid.unsqueeze(1), 0.0))
    loss, hard, soft, lse = (torch.where(valid, value, 0.0) for value in (loss, hard, soft, lse))
    return loss, hard, soft, lse, valid & (z_label.squeeze(1) >= 0.0)


class _ShardedSparseSoftCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        rows: Rows,
        options: LossOptions,
        shard: tuple[int, int],
        group: dist.ProcessGroup | None,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        grad = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad = logits.detach() if inplace else torch.empty_like(logits)
        row_loss, *outputs = shard_loss(logits.detach(), rows, options, *shard, group, grad)
        if grad is not None and inplace:
            torch.autograd.graph.increment_version(logits)
        ctx.grad = grad  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(*outputs)
        return (row_loss * rows.row_scale).sum(), *outputs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.grad  # type: ignore[attr-defined]
        if grad is None:
            raise RuntimeError("the loss's gradient was taken twice: it lives in memory that was handed out")
        ctx.grad = None  # type: ignore[attr-defined]
        return scale_(grad, grad_outputs[0]), None, None, None, None, None


def sharded_sparse_soft_ce(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    first: int,
    vocabulary: int,
    group: dist.ProcessGroup | None = None,
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
    inplace: bool = True,
) -> LossOutput:
    """Return `sparse_soft_ce` of logits of which this rank holds the columns from `first` on.

    Args:
        logits: float[N, V_local], the columns first, …, first + V_local − 1 of `vocabulary`. All ranks of
            `group` call with the same rows; labels and ids are those of the whole vocabulary. Shards may
            differ in width.
        The others are `sparse_soft_ce`'s; cells that are ranges are not supported.

    Raises ConfigError for shapes and options that do not fit, and on the CPU for labels and ids outside the vocabulary.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ConfigError(f"logits are {logits.dtype}{list(logits.shape)}, expected float[N, V_local]")
    if not (first >= 0 and logits.shape[1] >= 1 and first + logits.shape[1] <= vocabulary):
        raise ConfigError(f"columns {first} to {first + logits.shape[1]} are not within the vocabulary of {vocabulary}")
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
    shape = (logits.shape[0], vocabulary)
    rows = check_rows(labels, ids, logprobs, hard_weight, row_weight, partition, None, shape=shape)
    if logits.device.type == "cpu":
        check_indices(rows, vocabulary)
    applied = _ShardedSparseSoftCE.apply(logits, rows, options, (first, vocabulary), group, inplace)  # type: ignore[no-untyped-call]
    return LossOutput(*applied)
