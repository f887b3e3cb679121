"""The two passes over a row of logits, in whole blocks without a mask and one masked remainder.

With V not a multiple of 16 a masked main loop would lose its 128-bit loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusechat.kernels import launch
from fusechat.kernels.softcap import capped

LOWEST = tl.constexpr(-3.0e38)
MINUS_INFINITY = tl.constexpr(float("-inf"))
# exp2 is one instruction where exp is five: what is denormal becomes 0.
LOG2E = tl.constexpr(1.4426950408889634)
PER_LANE = tl.constexpr(launch.PER_LANE)


@triton.jit
def _scan_block(
    u, top, total, total_hard, total_z, n_z, base, rate, cap, TAU: tl.constexpr, CAP: tl.constexpr,
    SUMS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add a block to every lane's own maximum, Σ exp((z − top) / τ), Σ exp(z − top), and Σ (z − base) and the number of
    the logits that are not −∞.

    A lane is a thread's share of the block, so that no thread waits for another in the loop over blocks.
    """
    u = tl.reshape(u, [PER_LANE // VECTOR, top.shape[0], VECTOR]).to(tl.float32)
    z, _ = capped(u, cap, CAP)
    if CAP:
        z = tl.where(u == MINUS_INFINITY, u, z)  # tanh would bring the cells' −∞ back
    new_top = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    difference = z - new_top[None, :, None]
    total = total * tl.exp2((top - new_top) * rate) + tl.sum(tl.sum(tl.exp2(difference * rate), 2), 0)
    if TAU:
        hard = tl.sum(tl.sum(tl.exp2(difference * LOG2E), 2), 0)
        total_hard = total_hard * tl.exp2((top - new_top) * LOG2E) + hard
    if SUMS:
        counts = z != MINUS_INFINITY
        total_z += tl.sum(tl.sum(tl.where(counts, z - base, 0.0), 2), 0)
        n_z += tl.sum(tl.sum(counts.to(tl.int32), 2), 0)
    return new_top, total, total_hard, total_z, n_z


@triton.jit
def _gradient_block(u, top, a, a_hard, offset, rate, cap, TAU: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr):
    u = u.to(tl.float32)
    z, slope = capped(u, cap, CAP)
    if SUMS:
        offset = tl.where(u == MINUS_INFINITY, 0.0, offset)
    g = a * tl.exp2((z - top) * rate) + offset
    if TAU:
        g += a_hard * tl.exp2((z - top) * LOG2E)
    if CAP:
        g *= slope
    return g


@triton.jit
def scan_row(z_row, V, base, rate, cap, TAU: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the maximum of a row, Σ exp((z − top) / τ), Σ exp(z − top), and Σ (z − base) and the number of the logits
    that are not −∞; the last three where they are wanted."""
    VECTOR: tl.constexpr = 128 // z_row.dtype.element_ty.primitive_bitwidth
    n_whole = V // BLOCK
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK // PER_LANE], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // PER_LANE], tl.float32)
    total_hard = total
    total_z = total
    n_z = tl.zeros([BLOCK // PER_LANE], tl.int32)
    # The next block is on its way while one is summed.
    ahead = tl.load(z_row + columns, mask=columns < n_whole * BLOCK)
    for block in range(0, n_whole):
        u = ahead
        ahead = tl.load(z_row + (block + 1) * BLOCK + columns, mask=columns < (n_whole - block - 1) * BLOCK)
        top, total, total_hard, total_z, n_z = _scan_block(
            u, top, total, total_hard, total_z, n_z, base, rate, cap, TAU, CAP, SUMS, VECTOR
        )
    if n_whole * BLOCK < V:
        last = n_whole * BLOCK + columns
        u = tl.load(z_row + last, mask=last < V, other=MINUS_INFINITY)
        top, total, total_hard, total_z, n_z = _scan_block(
            u, top, total, total_hard, total_z, n_z, base, rate, cap, TAU, CAP, SUMS, VECTOR
        )
    lanes = top
    top = tl.max(lanes, 0)
    total = tl.sum(total * tl.exp2((lanes - top) * rate), 0)
    if TAU:
        total_hard = tl.sum(total_hard * tl.exp2((lanes - top) * LOG2E), 0)
    if SUMS:
        total_z = tl.sum(total_z, 0)
        n_z = tl.sum(n_z, 0)
    return top, total, total_hard, total_z, n_z


@triton.jit
def write_row(
    z_row, g_row, V, top, a, a_hard, offset, rate, cap, TAU: tl.constexpr, CAP: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row's tail, the end first, which is hottest in the L2 cache."""
    n_whole = V // BLOCK
    columns = tl.arange(0, BLOCK)
    if n_whole * BLOCK < V:
        last = n_whole * BLOCK + columns
        u = tl.load(z_row + last, mask=last < V, other=MINUS_INFINITY)
        value = _gradient_block(u, top, a, a_hard, offset, rate, cap, TAU, CAP, SUMS)
        tl.store(g_row + last, value.to(g_row.dtype.element_ty), mask=last < V)
    ahead = tl.load(z_row + (n_whole - 1) * BLOCK + columns, mask=columns < n_whole * BLOCK)
    for step in range(0, n_whole):
        block = n_whole - 1 - step
        u = ahead
        ahead = tl.load(z_row + (block - 1) * BLOCK + columns, mask=columns < block * BLOCK)
        value = _gradient_block(u, top, a, a_hard, offset, rate, cap, TAU, CAP, SUMS)
        tl.store(g_row + block * BLOCK + columns, value.to(g_row.dtype.element_ty))


@triton.jit
def write_zeros(g_row, V, BLOCK: tl.constexpr):
    """Write the gradient of a row that does not count."""
    n_whole = V // BLOCK
    columns = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], g_row.dtype.element_ty)
    for block in range(0, n_whole):
        tl.store(g_row + block * BLOCK + columns, zero)
    last = n_whole * BLOCK + columns
    tl.store(g_row + last, zero, mask=last < V)
