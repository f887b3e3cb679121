"""How much of the logits the linear loss and the top-k hold at a time: numbers without torch, for them and the plan."""

from __future__ import annotations

from fusechat.errors import ConfigError

_LEAST_DEFAULT_BYTES = 256 << 20
# A chunk of R rows in bf16 reads the head once for R FLOPs a byte, and an H200 does 165 in the time of one: 64 MiB, 220
# rows of a vocabulary of 152,000, would have it wait for the head.
TOPK_GPU_BUDGET_BYTES = 512 << 20
# The compiled engine's rows and bytes of logits at a time. A product of few rows costs nearly as many reads of the head
# as one of many, so it is the vocabulary that is cut.
TOPK_ENGINE_ROWS, TOPK_ENGINE_BUDGET_BYTES = 256, 8 << 20
# Rows begin at multiples of it, whatever the vocabulary: the kernel's 128-bit loads and cuBLAS's fast products need it.
_ROW_ELEMENTS = 16


def row_stride(vocabulary: int) -> int:
    """Return the elements from one row of a logits buffer to the next."""
    return -(-vocabulary // _ROW_ELEMENTS) * _ROW_ELEMENTS


def plan_chunk_rows(
    n_rows: int, vocabulary: int, width: int, *,
    weight_bytes: int, weight_grad: bool, logits_bytes: int, budget_bytes: int | None,
) -> int:  # fmt: skip
    """Return how many rows of logits fit `budget_bytes`, which also holds the fp32 sum of dW when there are several
    chunks.

    Elements of the weight [vocabulary, width] and of the logits take `weight_bytes` and `logits_bytes`. Without a
    budget: as much as the weight takes in fp32, at least 256 MiB, since a training step holds that much for dW anyway.
    Raises ConfigError, naming the least budget that works.
    """
    row_bytes = row_stride(vocabulary) * logits_bytes
    sum_bytes = accumulator_bytes(vocabulary, width, weight_bytes=weight_bytes, weight_grad=weight_grad)
    if budget_bytes is None:
        budget_bytes = max(vocabulary * width * 4, _LEAST_DEFAULT_BYTES) + sum_bytes
    if n_rows * row_bytes <= budget_bytes:
        return max(n_rows, 1)
    chunk_rows = (budget_bytes - sum_bytes) // row_bytes
    if chunk_rows < 1:
        raise ConfigError(
            f"budget_bytes is {budget_bytes}, too little for one row of logits and the sum of dW: give at least "
            f"{row_bytes + sum_bytes}"
        )
    return chunk_rows


def accumulator_bytes(vocabulary: int, width: int, *, weight_bytes: int, weight_grad: bool) -> int:
    """Return the size of the fp32 sum of dW that several chunks need beside the result: none where the result is
    fp32."""
    return vocabulary * width * 4 if weight_grad and weight_bytes != 4 else 0
