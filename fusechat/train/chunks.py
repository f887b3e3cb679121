"""Approximate likelihood matching: the likelihoods of byte-aligned chunks of text (arXiv 2503.20083).

A chunk is the text between two neighbouring places where both tokenizations have a boundary. With log-likelihoods
log p (source) and log q (target) of a chunk, and temperature τ, the paper's binarised divergence compares the events
"this chunk" and "anything else":

    D = f(p^(1/τ) ‖ q^(1/τ)) + f(1 − p^(1/τ) ‖ 1 − q^(1/τ)),   f(a ‖ b) = a·log(a/b)
"""

from __future__ import annotations

import torch
from torch import Tensor

# Likelihoods of one are no news: log(1 − q) is taken no nearer to −∞ than this from them.
_LEAST_NEGATIVE = 1e-6


def chunk_divergence(source_logprob: Tensor, target_logprob: Tensor, temperature: float) -> Tensor:
    """Return D of each chunk, float[C], from log-likelihoods float[C]; differentiable in the target's."""
    log_p = (source_logprob / temperature).clamp(max=-_LEAST_NEGATIVE)
    log_q = (target_logprob / temperature).clamp(max=-_LEAST_NEGATIVE)
    rest_p, rest_q = torch.log(-torch.expm1(log_p)), torch.log(-torch.expm1(log_q))
    return log_p.exp() * (log_p - log_q) + rest_p.exp() * (rest_p - rest_q)


def alm_row_weights(nll: Tensor, chunk: Tensor, source_logprob: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return, per row, its chunk's divergence spread evenly over the chunk's rows, and ∂D/∂nll of the row.

    Args:
        nll: float32[R], −log q of each row's token. chunk: int64[R], −1 for rows outside all chunks.
        source_logprob: float32[C].
    """
    n_chunks = source_logprob.shape[0]
    place = torch.where(chunk >= 0, chunk, n_chunks)
    sums = nll.new_zeros(n_chunks + 1).index_add_(0, place, nll.detach())[:n_chunks]
    sizes = nll.new_zeros(n_chunks + 1).index_add_(0, place, torch.ones_like(nll))[:n_chunks]
    with torch.enable_grad():
        total = sums.requires_grad_(True)
        values = chunk_divergence(source_logprob, -total, temperature)
        (slope,) = torch.autograd.grad(values.sum(), total)
    none = nll.new_zeros(1)
    values, slope = torch.cat([values.detach() / sizes.clamp(min=1), none]), torch.cat([slope, none])
    return values[place], slope[place]
