"""How many rows of logits the linear loss holds at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fusechat.errors import ConfigError

_LEAST_DEFAULT_BYTES = 256 << 20
# Rows begin at multiples of it, whatever the vocabulary: the kernel's 128-bit loads and cuBLAS's fast products need it.
_ROW_ELEMENTS = 16


def row_stride(vocabulary: int) -> int:
    """Return the elements from one row of a logits buffer to the next."""
    return -(-vocabulary // _ROW_ELEMENTS) * _ROW_ELEMENTS


def plan_chunk_rows(
    n_rows: int, weight: Tensor, *, weight_grad: bool, logits_bytes: int, budget_bytes: int | None
) -> int:
    """Return how many rows of logits fit `budget_bytes`, which also holds the fp32 sum of dW when there are
    several chunks.

    Without a budget: as much as the weight takes in fp32, at least 256 MiB, since a training step holds that
        much for dW anyway. Raises ConfigError, naming the least budget that works.
    """
    vocabulary, width = weight.shape
    row_bytes = row_stride(vocabulary) * logits_bytes
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
