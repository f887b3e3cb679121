"""Rows as the research code's dense bfloat16 targets hold them, for comparisons with it."""

from __future__ import annotations

import torch
from torch import Tensor


def upstream_rows(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and logprobs float32[N, K] of what the research code's dense targets hold, and their mass float32[N].

    There the softmax of a row's entries is rounded to bfloat16 and scattered over zeros: of equal ids the last stays,
    and the masses need not sum to one. The loss scales a row's masses to one with missing `renormalise`, so that its
    soft term times `mass` is the cross-entropy with the dense target. A row without entries has mass one.

    Args:
        ids: integer[N, K], −1 where absent. logprobs: float[N, K], −∞ where absent.
    """
    present = (ids >= 0) & (logprobs > float("-inf"))
    p = torch.softmax(torch.where(present, logprobs.float(), float("-inf")), 1).to(torch.bfloat16).float()
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
    overwritten = ((ids.unsqueeze(2) == ids.unsqueeze(1)) & present.unsqueeze(1) & later).any(2)
    kept = present & ~overwritten
    p = torch.where(kept, p, 0.0)
    return torch.where(kept, ids, -1), p.log(), torch.where(kept.any(1), p.sum(1), 1.0)
