"""What a loss call works on, row by row, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusechat.errors import ConfigError

IGNORE_LABEL = -100
_MOST = 0.01  # as a log-probability: what rounding to half precision makes of a sum of masses is well below


class LossOutput(NamedTuple):
    """What the fusion loss returns; only `loss` carries a gradient. Rows whose label is −100 hold 0 and
    False."""

    loss: Tensor
    """float32 scalar."""
    hard: Tensor
    """float32[N], cross-entropy with the label at temperature 1, label smoothing included."""
    soft: Tensor
    """float32[N], divergence from the teacher times student_temperature²; 0 where the row has no teacher
    entry."""
    lse: Tensor
    """float32[N], logsumexp of the (softcapped) logits."""
    correct: Tensor
    """bool[N], whether no logit exceeds the label's."""


class Cells(NamedTuple):
    """Cells of more than one token, for rows whose source token ends before the pivot's: ranges of the
    byte-sorted vocabulary.

    The entry (n, k) with high > low is the cell of tokens order[low], …, order[high − 1] that lie in no
    smaller range and are no single id of the row; its mass is exp(logprobs[n, k]), and ids[n, k] is not read.
    Other entries are single ids as ever.
    """

    order: Tensor
    """int32[V], the tokens in lexicographic order of their bytes."""
    low: Tensor
    """int32[N, K]."""
    high: Tensor
    """int32[N, K], one past the last."""


class Rows(NamedTuple):
    """The row-wise inputs in the one form that every backend takes."""

    labels: Tensor
    """int64[N]."""
    ids: Tensor
    """int64[N, K], −1 where absent."""
    logprobs: Tensor
    """float32[N, K]."""
    hard_weight: Tensor
    """float32[N]."""
    row_scale: Tensor
    """float32[N], the factor of each row in the loss, 0 where the label is −100."""
    partition: Tensor
    """bool[N]."""
    order: Tensor | None = None
    """int32[V], of `Cells`; None where no row has ranges."""
    low: Tensor | None = None
    """int32[N, K]."""
    high: Tensor | None = None
    """int32[N, K]."""

    def counting(self) -> Tensor:
        """Return the indices of the rows whose label counts; on a GPU this waits for the device."""
        return (self.labels != IGNORE_LABEL).nonzero().squeeze(1)

    def take(self, index: Tensor | slice) -> Rows:
        """Return the rows at `index`."""
        low, high = (None if column is None else column[index] for column in (self.low, self.high))
        labels, ids, logprobs, hard_weight, row_scale, partition = (column[index] for column in self[:6])
        return Rows(labels, ids, logprobs, hard_weight, row_scale, partition, self.order, low, high)


def check_rows(
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    hard_weight: float | Tensor,
    row_weight: Tensor | None,
    partition: Tensor | None,
    cells: Cells | None,
    *,
    shape: tuple[int, int],
) -> Rows:
    """Check shapes, dtypes and devices and bring the row-wise inputs into one form, without a host sync.

    `shape` is that of the logits, [N, V]. On the CPU, where nothing waits, log-probabilities that are none
    (NaN, probabilities, logits) are refused, too.
    """
    n_rows, vocabulary = shape
    for name, tensor in (("labels", labels), ("ids", ids), ("logprobs", logprobs)):
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name} is a {type(tensor).__name__}, expected a tensor: torch.as_tensor makes one")
        if tensor.device != labels.device:
            raise ConfigError(f"labels are on {labels.device} and {name} on {tensor.device}: move them to one device")
    integral = (torch.int64, torch.int32, torch.int16, torch.uint8)
    if labels.shape != (n_rows,) or labels.dtype not in integral:
        raise ConfigError(f"labels are {labels.dtype}{list(labels.shape)}, expected int64[{n_rows}]")
    if ids.ndim != 2 or ids.shape[0] != n_rows or ids.dtype not in integral:
        raise ConfigError(f"ids are {ids.dtype}{list(ids.shape)}, expected int64[{n_rows}, K]")
    if logprobs.shape != ids.shape or not logprobs.is_floating_point():
        raise ConfigError(f"logprobs are {logprobs.dtype}{list(logprobs.shape)}, expected float32{list(ids.shape)}")
    if labels.device.type == "cpu" and logprobs.numel() and not torch.compiler.is_compiling():
        _check_logprobs(logprobs)
    if isinstance(hard_weight, Tensor):
        if hard_weight.shape != (n_rows,):
            raise ConfigError(f"hard_weight is {list(hard_weight.shape)}, expected a float or float32[{n_rows}]")
        hard_weight = hard_weight.float()
    else:
        if not 0 <= hard_weight <= 1:
            raise ConfigError(f"hard_weight is {hard_weight}, expected 0 <= hard_weight <= 1")
        hard_weight = torch.full((n_rows,), hard_weight, dtype=torch.float32, device=labels.device)
    valid = labels != IGNORE_LABEL
    if row_weight is None:
        row_scale = valid.float() / valid.sum().clamp(min=1)
    elif row_weight.shape != (n_rows,):
        raise ConfigError(f"row_weight is {list(row_weight.shape)}, expected float32[{n_rows}]")
    else:
        row_scale = torch.where(valid, row_weight.float(), 0.0)
    if partition is None:
        partition = torch.zeros(n_rows, dtype=torch.bool, device=labels.device)
    elif partition.shape != (n_rows,) or partition.dtype != torch.bool:
        raise ConfigError(f"partition is {partition.dtype}{list(partition.shape)}, expected bool[{n_rows}]")
    rows = Rows(labels.long(), ids.long(), logprobs.float(), hard_weight, row_scale, partition)
    if cells is None:
        return rows
    for name, tensor, expected in (
        ("order", cells.order, (vocabulary,)),
        ("low", cells.low, ids.shape),
        ("high", cells.high, ids.shape),
    ):
        if tensor.shape != expected or tensor.dtype != torch.int32:
            raise ConfigError(f"cells.{name} is {tensor.dtype}{list(tensor.shape)}, expected int32{list(expected)}")
    return rows._replace(order=cells.order, low=cells.low, high=cells.high)


def _check_logprobs(logprobs: Tensor) -> None:
    largest = float(logprobs.detach().amax())
    if not largest <= _MOST:  # nor is NaN
        raise ConfigError(
            f"logprobs hold {largest:.4g}, expected natural logarithms of probabilities, −inf where absent: take "
            "log_softmax(logits).topk(K)"
        )
