"""The divergences between a teacher and a student over cells; reference.py has the same formulas with their papers."""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754944e-38)
MASS_FLOOR = tl.constexpr(1e-6)


@triton.jit
def divergence_terms(p, log_q, beta, DIVERGENCE: tl.constexpr):
    """f(Q) and g = Q f'(Q) of each cell; add a divergence here and in reference.py."""
    q = tl.exp(log_q)
    log_p = tl.log(tl.maximum(p, TINY))
    if DIVERGENCE == "ce":
        f = tl.where(p > 0, -p * log_q, 0.0)
        g = -p
    elif DIVERGENCE == "kl":
        f = tl.where(p > 0, p * (log_p - log_q), 0.0)
        g = -p
    elif DIVERGENCE == "tvd":
        f = 0.5 * tl.abs(p - q)
        g = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    elif DIVERGENCE == "reverse_kl":
        ratio = tl.where(q > 0, log_q - tl.log(tl.maximum(p, MASS_FLOOR)), 0.0)
        f = q * ratio
        g = q * (ratio + 1.0)
    elif DIVERGENCE == "alpha":
        mixed = tl.where(p > 0, tl.exp(beta * log_p + (1.0 - beta) * log_q), 0.0)
        f = (beta * p + (1.0 - beta) * q - mixed) / (beta * (1.0 - beta))
        g = (q - mixed) / beta
    else:
        mixture = beta * p + (1.0 - beta) * q
        log_mixture = tl.log(tl.maximum(mixture, TINY))
        p_part = tl.where(p > 0, p * (log_p - log_mixture), 0.0)
        if DIVERGENCE == "skew_kl":
            f = p_part
            g = tl.where(p > 0, -p * (1.0 - beta) * q / mixture, 0.0)
        else:
            tl.static_assert(DIVERGENCE == "jsd", "unknown divergence")
            q_part = tl.where(q > 0, q * (log_q - log_mixture), 0.0)
            f = beta * p_part + (1.0 - beta) * q_part
            g = (1.0 - beta) * q_part
    return f, g
