"""The final-logit softcap of Gemma 2 (arXiv 2408.00118, section 2)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(u, cap, CAP: tl.constexpr):
    """cap · tanh(u / cap), and its derivative."""
    slope = tl.where(u > 0, 1.0, 1.0)  # of u's shape, and 1 where u is −∞, too
    z = u
    if CAP:
        e = tl.exp(tl.minimum(2.0 * tl.abs(u) / cap, 80.0))
        z = cap * (1.0 - 2.0 / (e + 1.0))
        z = tl.where(u < 0, -z, tl.where(u == u, z, u))  # a minimum may drop NaN  # noqa: PLR0124
        slope = 4.0 * e / ((e + 1.0) * (e + 1.0))
    return z, slope
