"""Cells that are ranges of the byte-sorted vocabulary, for the rows of the loss kernel that have them.

A range's tokens lie apart in the row, together in rank: they are gathered, kept in a scratch row by rank, and −∞ is
stored in their place, so that the tail needs no mask; after the dense pass their gradients are scattered. A rank
belongs to the smallest range around it, which each program finds by comparing the row's K ranges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusechat.kernels.softcap import capped

# Ranks that are gathered at a time: with 16 entries 8,192 comparisons, of which a thread keeps few.
RANKS = tl.constexpr(512)
LOWEST = tl.constexpr(-3.0e38)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _owned(ranks, low, high, k_low, k_high, is_cell):
    """Whether each rank lies in the range [low, high) and in no smaller cell."""
    width = high - low
    k_width = k_high - k_low
    smaller = is_cell & ((k_width < width) | ((k_width == width) & (k_low < low)))
    inside = (ranks[:, None] >= k_low[None, :]) & (ranks[:, None] < k_high[None, :]) & smaller[None, :]
    return (ranks >= low) & (ranks < high) & (tl.max(inside.to(tl.int32), 1) == 0)


@triton.jit
def _bounds(LOW, HIGH, c, k, is_cell, wide):
    """The ranks of entry c, none where it is no range of its own."""
    low = tl.load(LOW + c)
    counts = tl.max((is_cell & wide & (k == c)).to(tl.int32), 0) > 0
    return low, tl.where(counts, tl.load(HIGH + c), low)


@triton.jit
def _at(values, k, c):
    return tl.sum(tl.where(k == c, values, 0.0), 0)


@triton.jit
def gather_ranges(
    z_row, SAVED, ORDER, LOW, HIGH, K, k, k_low, k_high, is_cell, wide, z_k, total_k, n_k, finite_k, base, inv_tau, cap,
    TAU: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Keep the ranges' logits, put −∞ in their place, and return each cell's maximum, its Σ exp((z − maximum) / τ),
    the same at τ = 1, Σ (z − base) over what is not −∞, its number of tokens and the number of those."""
    sum_k = tl.full([KB], 1.0, tl.float32)
    hard_k = sum_k
    for c in range(0, K):
        low, high = _bounds(LOW, HIGH, c, k, is_cell, wide)
        top = LOWEST
        total = 0.0
        hard = 0.0
        total_z = 0.0
        count = 0
        finite = 0
        for first in range(low, high, RANKS):
            ranks = first + tl.arange(0, RANKS)
            mine = _owned(ranks, low, high, k_low, k_high, is_cell)
            token = z_row + tl.load(ORDER + ranks, mask=ranks < high, other=0)
            u = tl.load(token, mask=mine, other=MINUS_INFINITY)
            tl.store(SAVED + ranks, u, mask=mine)
            tl.store(token, tl.full([RANKS], MINUS_INFINITY, tl.float32).to(u.dtype), mask=mine)
            z, _ = capped(u.to(tl.float32), cap, CAP)
            z = tl.where(mine, z, MINUS_INFINITY)
            new_top = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp((top - new_top) * inv_tau) + tl.sum(tl.exp((z - new_top) * inv_tau), 0)
            if TAU:
                hard = hard * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
            if SUMS:
                counts = z != MINUS_INFINITY
                total_z += tl.sum(tl.where(counts, z - base, 0.0), 0)
                finite += tl.sum(counts.to(tl.int32), 0)
            top = new_top
            count += tl.sum(mine.to(tl.int32), 0)
        here = (k == c) & wide
        z_k = tl.where(here, tl.where(total > 0, top, MINUS_INFINITY), z_k)
        sum_k = tl.where(here, tl.where(total > 0, total, 1.0), sum_k)
        hard_k = tl.where(here, hard if TAU else total, hard_k)
        total_k = tl.where(here, total_z, total_k)
        n_k = tl.where(here, count, n_k)
        finite_k = tl.where(here, finite, finite_k)
    return z_k, sum_k, hard_k, total_k, n_k, finite_k


@triton.jit
def restore_ranges(z_row, SAVED, ORDER, LOW, HIGH, K, k, k_low, k_high, is_cell, wide):
    """Bring the ranges' logits back."""
    for c in range(0, K):
        low, high = _bounds(LOW, HIGH, c, k, is_cell, wide)
        for first in range(low, high, RANKS):
            ranks = first + tl.arange(0, RANKS)
            mine = _owned(ranks, low, high, k_low, k_high, is_cell)
            token = tl.load(ORDER + ranks, mask=ranks < high, other=0)
            tl.store(z_row + token, tl.load(SAVED + ranks, mask=mine), mask=mine)


@triton.jit
def scatter_ranges(
    g_row, SAVED, ORDER, LOW, HIGH, K, k, k_low, k_high, is_cell, wide, a_k, z_k, per_hard, top, flat, label, at_label,
    inv_tau, cap, CAP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the ranges' tokens: a_k exp((z − z_k) / τ) + per_hard exp(z − top) + flat."""
    for c in range(0, K):
        low, high = _bounds(LOW, HIGH, c, k, is_cell, wide)
        # A finite maximum also where every token is ruled out: −∞ − (−∞) would be NaN.
        a, z_top = _at(a_k, k, c), tl.maximum(_at(z_k, k, c), LOWEST)
        for first in range(low, high, RANKS):
            ranks = first + tl.arange(0, RANKS)
            mine = _owned(ranks, low, high, k_low, k_high, is_cell)
            token = tl.load(ORDER + ranks, mask=ranks < high, other=0)
            u = tl.load(SAVED + ranks, mask=mine, other=MINUS_INFINITY).to(tl.float32)
            z, slope = capped(u, cap, CAP)
            value = a * tl.exp((z - z_top) * inv_tau) + per_hard * tl.exp(z - top)
            value += tl.where(u == MINUS_INFINITY, 0.0, flat)
            value = (value + tl.where(token == label, at_label, 0.0)) * slope
            tl.store(g_row + token, value.to(g_row.dtype.element_ty), mask=mine)


def prepare_ranges(ids: Tensor, order: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids with ranges of one token among them, low and high where every single id is a range of one rank, and
    which rows have wider ranges bool[N]; nothing waits for the device.

    Absent entries are empty ranges. Ranges outside the vocabulary stay, for the kernel to find.
    """
    vocabulary = len(order)
    one = (high - low == 1) & (low >= 0) & (high <= vocabulary)
    wide = (high > low) & ~one
    ids = torch.where(one, order[torch.where(one, low, 0).long()].long(), torch.where(wide, -1, ids))
    rank = torch.empty_like(order)
    rank[order.long()] = torch.arange(vocabulary, dtype=order.dtype, device=order.device)
    known = (ids >= 0) & (ids < vocabulary)
    single = torch.where(known, rank[torch.where(known, ids, 0)], 0)
    low = torch.where(wide, low, single).contiguous()
    high = torch.where(wide, high, single + known.to(single.dtype)).contiguous()
    return ids, low, high, wide.any(1)
