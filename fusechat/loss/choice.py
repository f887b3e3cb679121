"""Choosing between the candidate distributions of a row by their cross-entropies, before any logit is read.

FuseChat's fusion function (arXiv 2408.07990, section 3.2; FuseLLM, arXiv 2401.10491, eq. 4) compares how well
each candidate predicted the text: `min_ce` takes the best, `avg_ce` weighs all by exp(−cross-entropy).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fusechat.errors import ConfigError

Choice = Literal["min_ce", "avg_ce"]


def candidate_weights(
    gold_logprob: Tensor, unit: Tensor, *, choice: Choice, n_units: int, size: Tensor | None = None
) -> Tensor:
    """Return the weight of each candidate in each row, float32[N, C]; rows sum to one.

    Equal, for one unit u and min_ce, to

        ce = −gold_logprob[unit == u].sum(0) / size[unit == u].sum()
        weights[unit == u] = onehot(ce.argmin())

    Args:
        gold_logprob: float[N, C], each candidate's log-probability of the row's gold token. Ties go to the
            first candidate, by custom the pivot.
        unit: int64[N] below n_units, what is decided as one: the row's sequence, its turn, or the row itself.
        choice: `min_ce`, or `avg_ce` with weights exp(−ce) / Σ exp(−ce).
        size: float32[N], what a row counts for in the mean: its token's bytes; one each if not given.

    Raises ConfigError for shapes and choices that do not fit.
    """
    if choice not in get_args(Choice):
        raise ConfigError(f"choice {choice!r} is unknown: use one of {', '.join(get_args(Choice))}")
    if gold_logprob.ndim != 2 or unit.shape != gold_logprob.shape[:1]:
        raise ConfigError(
            f"gold_logprob is {list(gold_logprob.shape)} and unit {list(unit.shape)}, expected [N, C] and [N]"
        )
    if gold_logprob.dtype != torch.float64:
        gold_logprob = gold_logprob.float()
    size = torch.ones_like(gold_logprob[:, 0]) if size is None else size.to(gold_logprob.dtype)
    if size.shape != unit.shape:
        raise ConfigError(f"size is {list(size.shape)}, expected [{unit.shape[0]}]")
    total = gold_logprob.new_zeros(n_units, gold_logprob.shape[1]).index_add_(0, unit, -gold_logprob)
    count = size.new_zeros(n_units).index_add_(0, unit, size)
    entropy = total / count.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    if choice == "avg_ce":
        weights = torch.softmax(-entropy, 1)
    else:
        weights = torch.nn.functional.one_hot(entropy.argmin(1), entropy.shape[1]).float()
    return weights[unit]


def mix_candidates(ids: Tensor, logprobs: Tensor, weights: Tensor, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Return the mixture Σ_c weights_c · p_c of sparse candidates as one sparse distribution.

    Its ids and logprobs are [N, C·K]. The entries stand side by side, for the loss adds up equal ids; entries of
    weight zero become absent. No pass over logits is needed, since losses of the same logits differ only in the K
    entries.

    Args:
        ids: int64[N, C, K], −1 where absent. logprobs: float[N, C, K]. weights: float32[N, C].
        renormalise: scale each candidate's entries to a sum of one first, as the loss's missing mass
            `renormalise` would have done with each alone.
    """
    if ids.ndim != 3 or logprobs.shape != ids.shape or weights.shape != ids.shape[:2]:
        raise ConfigError(
            f"ids are {list(ids.shape)}, logprobs {list(logprobs.shape)} and weights {list(weights.shape)}, "
            "expected [N, C, K] twice and [N, C]"
        )
    present = (ids >= 0) & (weights > 0).unsqueeze(2)
    logprobs = torch.where(present, logprobs.float(), float("-inf"))
    if renormalise:
        sums = torch.logsumexp(logprobs, 2, keepdim=True)
        logprobs = torch.where(present, logprobs - sums, float("-inf"))
    logprobs = logprobs + weights.clamp(min=torch.finfo(torch.float32).tiny).log().unsqueeze(2)
    return torch.where(present, ids, -1).flatten(1), logprobs.flatten(1)
