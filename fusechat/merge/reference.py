"""The plain definition of every method, one tensor in float64 NumPy: what the engine is measured against.

Nothing calls this to merge a model. `base` is float32[n], `targets` float32[J, n]; task vectors are taken in fp32, as
the engine's are, and everything after that is float64, with the keys of selection and the elected sums exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Variant = Literal["paper", "fuseai", "mergekit"]


def task_vectors(base: F32, targets: F32) -> F64:
    """Return δ_j = φ_j − θ, float64[J, n] (eq. 5), rounded once to fp32."""
    return (targets - base[None, :]).astype(np.float64)


def _exact(deltas: F64) -> list[list[int]]:
    # Every fp32 value is an integer multiple of 2^-149, so these are exact.
    return [[int(x * 2.0**149) for x in row] for row in deltas.tolist()]


def top_by_variance(deltas: F64, share: float, *, in_fp32: bool) -> Bools:
    """Return the mask of eq. 6: the `share` of elements of non-zero variance over targets with the largest variance.

    Ties go to the lowest index. `in_fp32` rounds the product of share and count as torch does.
    """
    rows = _exact(deltas)
    n_targets, n = deltas.shape
    keys = [n_targets * sum(r[i] ** 2 for r in rows) - sum(r[i] for r in rows) ** 2 for i in range(n)]
    n_nonzero = sum(key > 0 for key in keys)
    k = int(np.float32(n_nonzero) * np.float32(share)) if in_fp32 else int(n_nonzero * Fraction(repr(share)))
    mask = np.zeros(n, np.bool_)
    mask[sorted(range(n), key=lambda i: (-keys[i], i))[:k]] = True
    return mask


def top_by_magnitude(delta: F64, k: int) -> Bools:
    """Return the mask of the k largest |δ|; ties go to the lowest index."""
    mask = np.zeros(delta.size, np.bool_)
    mask[np.lexsort((np.arange(delta.size), -np.abs(delta)))[:k]] = True
    return mask


def agrees_with_majority(deltas: F64, weights: Sequence[float]) -> Bools:
    """Return bool[J, n]: whether w_j δ_j has the sign of Σ_j w_j δ_j, where a sum of zero counts as positive."""
    rows = [[Fraction(w) * x for x in row] for w, row in zip(weights, _exact(deltas))]
    positive = np.array([sum(row[i] for row in rows) >= 0 for i in range(deltas.shape[1])], np.bool_)
    weighted_signs = np.sign(deltas) * np.sign(np.array(weights, np.float64))[:, None]
    agrees: Bools = weighted_signs == np.where(positive, 1.0, -1.0)[None, :]
    return agrees


def sce(base: F32, targets: F32, *, select_topk: float, variant: Variant) -> F64:
    """Return the SCE merge, float64[n] (eqs 5–9, and the two other readings of them)."""
    deltas = task_vectors(base, targets)
    mask = np.ones(base.size, np.bool_)
    if select_topk < 1:
        mask = top_by_variance(deltas, select_topk, in_fp32=variant != "paper")
    selected = deltas * mask
    energy = (selected**2).sum(axis=1)
    uniform = np.full(len(deltas), 1 / len(deltas))
    if energy.sum() == 0 or (variant == "mergekit" and energy.sum() / base.size < 1e-6):
        eta = uniform
    else:
        eta = energy / energy.sum()
    merged = deltas if variant == "fuseai" else selected
    kept = agrees_with_majority(merged, [1.0] * len(deltas))
    update = (eta[:, None] * merged * kept).sum(axis=0)
    if variant != "paper":
        surviving = (eta[:, None] * kept).sum(axis=0)
        update /= np.maximum(surviving, 1e-6) if variant == "mergekit" else np.where(surviving == 0, 1, surviving)
    return np.asarray(base + update)


def linear(targets: F32, weights: Sequence[float], *, normalize: bool) -> F64:
    """Return Σ w_j θ_j, divided by Σ w_j when `normalize`."""
    w = np.array(weights, np.float64)
    return np.asarray((w[:, None] * targets).sum(axis=0) / (w.sum() if normalize else 1.0))


def task_arithmetic(
    base: F32,
    targets: F32,
    weights: Sequence[float],
    *,
    normalize: bool,
    scale: float,
    density: Sequence[float] | None = None,
    elect: bool = False,
) -> F64:
    """Return θ + scale · Σ w_j δ_j; `density` trims the δ by magnitude, `elect` drops the minority sign (TIES)."""
    deltas = task_vectors(base, targets)
    if density is not None:
        masks = [
            top_by_magnitude(d, int(share * d.size)) if share < 1 else np.ones(d.size, np.bool_)
            for d, share in zip(deltas, density)
        ]
        deltas = deltas * np.stack(masks)
    return _weighted(base, deltas, weights, normalize=normalize, scale=scale, elect=elect)


def _weighted(base: F32, deltas: F64, weights: Sequence[float], *, normalize: bool, scale: float, elect: bool) -> F64:
    w = np.array(weights, np.float64)[:, None]
    kept = agrees_with_majority(deltas, weights) if elect else np.ones(deltas.shape, np.bool_)
    update = (w * deltas * kept).sum(axis=0)
    if normalize:
        total = (w * kept).sum(axis=0)
        update /= np.where(np.abs(total) < 1e-8, 1.0, total)
    return np.asarray(base + scale * update)


def dare(
    base: F32, targets: F32, weights: Sequence[float], kept: Bools, density: Sequence[float], *, normalize: bool,
    scale: float, elect: bool,
) -> F64:  # fmt: skip
    """Return the DARE merge given which elements the draw kept, bool[J, n]: survivors are divided by their density."""
    shares = np.array(density, np.float64)[:, None]
    return _weighted(
        base, task_vectors(base, targets) * kept / shares, weights, normalize=normalize, scale=scale, elect=elect
    )


def varm(base: F32, targets: F32, energy: F64 | None) -> F64:
    """Return the VaRM merge Σ_j W_j θ_j, W_j ∝ `energy`[j] over the unit, or per element δ_j² when None (v1, eq. 7)."""
    deltas = task_vectors(base, targets)
    squares = deltas**2 if energy is None else energy[:, None]
    total = np.broadcast_to(squares.sum(axis=0), base.shape)
    safe = np.where(total > 0, total, 1.0)
    return np.asarray(base + (squares * deltas).sum(axis=0) / safe)


def slerp(first: F32, second: F32, t: float) -> F64:
    """Return the spherical interpolation from `first` (t = 0) to `second`; linear when they are nearly parallel."""
    v0, v1 = first.astype(np.float64), second.astype(np.float64)
    lengths = float(np.linalg.norm(v0) * np.linalg.norm(v1))
    cosine = float(v0 @ v1) / lengths if lengths > 0 else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * v0 + t * v1
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * angle) * v0 + np.sin(t * angle) * v1) / np.sin(angle))
