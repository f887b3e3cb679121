"""What the benchmarks compare with, written plainly: what one would write first, and what the research code does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_loss(logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, hard_weight: float) -> Tensor:
    """Compute the fusion loss by gathering from log-softmax's parts; autograd does the rest."""
    p = torch.softmax(logprobs, 1)
    lse = torch.logsumexp(logits.float(), 1)
    hard = lse - logits.gather(1, labels.unsqueeze(1)).squeeze(1).float()
    soft = lse - (p * logits.gather(1, ids).float()).sum(1)
    return (hard_weight * hard + (1.0 - hard_weight) * soft).mean()


def collate_dense(ids: Tensor, logits: Tensor, vocabulary: int) -> Tensor:
    """Build a dense bf16 target [B, S, V] from [B, S, K] entries, sequence by sequence, as the research code does."""
    targets = []
    for sequence_ids, sequence_logits in zip(ids, logits):
        mass = torch.softmax(sequence_logits.float(), -1).to(torch.bfloat16)
        target = torch.zeros(sequence_ids.shape[0], vocabulary, dtype=torch.bfloat16)
        targets.append(target.scatter_(-1, sequence_ids, mass))
    return torch.stack(targets)


def dense_loss(
    logits: Tensor, labels: Tensor, pivot: Tensor, source: Tensor, metric: Tensor, hard_weight: float
) -> Tensor:
    """Compute the research code's loss: choose between two dense targets by reward, element by element.

    logits, pivot and source are [B, S, V], metric [B, 2] the two distributions' cross-entropies of each sequence.
    """
    reward = torch.exp(-metric.to(torch.bfloat16))
    rewards = torch.stack([reward[:, i].view(-1, 1, 1).expand_as(pivot) for i in range(2)], -1)
    index = torch.argmax(rewards, -1, keepdim=True)
    target = torch.stack([pivot, source], -1).gather(-1, index).squeeze(-1)
    flat = logits.view(-1, logits.shape[-1])
    hard = F.cross_entropy(flat, labels.view(-1))
    soft = F.cross_entropy(flat, target.view(-1, target.shape[-1]).to(flat.dtype))
    return hard_weight * hard + (1.0 - hard_weight) * soft


def padded_topk(model: Any, sequences: Sequence[Any], k: int, *, length: int = 2048) -> list[tuple[Tensor, Tensor]]:
    """Extract top-k logits as the research code does: pad to `length`, all logits in fp16 on the CPU, then top-k.

    Returns ids int64[T, k] and logits float16[T, k] of each sequence of token ids.
    """
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(sequences):
        input_ids[b, : len(ids)] = torch.as_tensor(ids)
        mask[b, : len(ids)] = 1
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask).logits.to(torch.float16).cpu()
    values, indices = logits.topk(k, dim=-1)
    return [(indices[b, : len(ids)], values[b, : len(ids)]) for b, ids in enumerate(sequences)]
