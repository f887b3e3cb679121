"""What one micro-batch teaches, as the model's forward takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

TOKEN_COLUMNS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionBatch:
    """The taught rows of a micro-batch; R rows may name one position several times.

    A class of its own, no mapping: FSDP's mixed precision would round float tensors that it finds in the arguments.
    """

    rows: Tensor
    """int64[R], places in the flattened [B·S] positions."""
    labels: Tensor
    """int64[R], the token each row predicts."""
    ids: Tensor
    """int32[R,K], −1 where absent."""
    logprobs: Tensor
    """float32[R,K]."""
    partition: Tensor
    """bool[R]."""
    row_weight: Tensor
    """float32[R]; the weights of a position's rows add up to one."""
    hard_weight: Tensor
    """float32[R], λ of this step, 1 where nothing is taught."""
    low: Tensor | None = None
    """int32[R,K], starts of ranges of the byte-sorted vocabulary; None where no row has ranges."""
    high: Tensor | None = None
    """int32[R,K], one past their ends."""
    chunk: Tensor | None = None
    """int64[R], the byte-aligned chunk a row belongs to, −1 for none (objective alm)."""
    chunk_logprob: Tensor | None = None
    """float32[C], the source's log-probability of each chunk."""


def fusion_batch(inputs: dict[str, Any], hard_weight: float) -> FusionBatch:
    """Build a batch from collated tensors; a row of which the share a is taught has λ' = 1 − (1 − λ)·a."""
    rows = inputs["rows"]
    return FusionBatch(
        rows=rows,
        labels=inputs["row_labels"],
        ids=inputs["target_ids"],
        logprobs=inputs["target_logprobs"],
        partition=inputs["partition"],
        row_weight=inputs["row_weight"],
        hard_weight=1.0 - (1.0 - hard_weight) * inputs["taught"],
        low=inputs.get("target_low"),
        high=inputs.get("target_high"),
        chunk=inputs.get("chunk"),
        chunk_logprob=inputs.get("chunk_logprob"),
    )
