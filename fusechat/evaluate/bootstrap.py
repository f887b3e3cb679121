"""Values that are ratios of sums over units (dialogues, questions), with intervals and tests that respect the pairing.

Every figure of an evaluation is Σ numerator / Σ denominator over units that all models share: bits over bytes, points
over ratings, agreements over rows. Units are resampled, never rows within them: rows of one dialogue are not
independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PERMUTATIONS = 10_000
_CHUNK_CELLS = 4_000_000

SIGNIFICANCE = {
    "test": f"{PERMUTATIONS:,} random swaps of the two models within units, paired and two-sided",
    "adjustment": "Holm: 'overall' over models, the other groups over models and groups together",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    def triple(self) -> list[float]:
        """Return [value, low, high], the form in every JSON."""
        return [self.value, self.low, self.high]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """One model's sums per unit: numerator and denominator float64[n]; its value is Σ numerator / Σ denominator."""

    numerator: npt.NDArray[np.float64]
    denominator: npt.NDArray[np.float64]

    def of(self, members: npt.NDArray[np.int64]) -> Ratio:
        """Return the ratio over some of the units."""
        return Ratio(numerator=self.numerator[members], denominator=self.denominator[members])


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A model's value, its paired difference to the model compared with, and the p-value of that difference."""

    level: Interval
    difference: Interval
    p: float


def compare(
    ratios: Mapping[str, Ratio],
    *,
    against: str,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Return each model's value and its paired difference to the model `against`.

    Intervals are percentile bootstraps over units; all models share the resamples, which is what pairs them. A ratio
    over nothing is NaN.
    """
    rng = np.random.default_rng(seed)
    n = len(ratios[against].numerator)
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=samples)
    bounds = [(1 - confidence) / 2, (1 + confidence) / 2]

    def value(ratio: Ratio) -> tuple[float, npt.NDArray[np.float64]]:
        with np.errstate(invalid="ignore"):  # 0 / 0, a group in which nothing was rated
            point = np.float64(ratio.numerator.sum()) / np.float64(ratio.denominator.sum())
            return float(point), (counts @ ratio.numerator) / (counts @ ratio.denominator)

    def interval(point: float, resampled: npt.NDArray[np.float64]) -> Interval:
        known = resampled[np.isfinite(resampled)]
        low, high = np.quantile(known, bounds) if len(known) else (np.nan, np.nan)
        return Interval(value=point, low=float(low), high=float(high))

    base_point, base_resampled = value(ratios[against])
    out = {}
    for name, ratio in ratios.items():
        point, resampled = value(ratio)
        out[name] = Comparison(
            level=interval(point, resampled),
            difference=interval(point - base_point, resampled - base_resampled),
            p=1.0 if name == against else swap_test(ratio, ratios[against], seed=seed),
        )
    return out


def swap_test(a: Ratio, b: Ratio, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Return the two-sided p-value of value(a) − value(b) when within each unit a and b are interchangeable.

    p = (1 + #{|T*| ≥ |T|}) / (1 + permutations), so that it is never 0; NaN when either has no value.
    """
    rng = np.random.default_rng(seed)
    top, bottom = b.numerator - a.numerator, b.denominator - a.denominator
    a_top, a_bottom, b_top, b_bottom = (
        float(part.sum()) for part in (a.numerator, a.denominator, b.numerator, b.denominator)
    )
    if a_bottom == 0 or b_bottom == 0:
        return float("nan")
    observed = abs(a_top / a_bottom - b_top / b_bottom)
    as_large, n = 0, len(top)
    step = max(1, _CHUNK_CELLS // n)
    for start in range(0, permutations, step):
        swap = rng.integers(0, 2, size=(min(step, permutations - start), n), dtype=np.int8).astype(np.float64)
        moved_top, moved_bottom = swap @ top, swap @ bottom
        with np.errstate(invalid="ignore", divide="ignore"):
            swapped = np.abs(
                (a_top + moved_top) / (a_bottom + moved_bottom) - (b_top - moved_top) / (b_bottom - moved_bottom)
            )
        # Equal up to rounding is as large; so is a swap that leaves one side nothing to be measured on.
        as_large += int((~(swapped < observed * (1 - 1e-9))).sum())
    return (1 + as_large) / (1 + permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's step-down method (1979), in the order given; NaN stays and counts not."""
    p = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = p.copy()
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return [float(value) for value in adjusted]


def comparison_table(
    groups: Mapping[str, Mapping[str, Ratio]],
    *,
    value_name: str,
    against: str,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return for ratios by group and model, as JSON values: `value_name` and `difference_to_AGAINST` as
    [value, low, high], `p` and `p_holm` of the difference (null for `against`). The first group is the one that
    decides, "overall".
    """
    compared = {
        group: compare(ratios, against=against, samples=samples, confidence=confidence, seed=seed)
        for group, ratios in groups.items()
    }
    overall, *parts = groups
    p_holm: dict[tuple[str, str], float] = {}
    for family in ([overall], parts):
        cells = [(group, name) for group in family for name in groups[group] if name != against]
        p_holm |= zip(cells, holm([compared[group][name].p for group, name in cells]))
    return {
        group: {
            name: {
                value_name: one.level.triple(),
                f"difference_to_{against}": one.difference.triple(),
                "p": None if name == against else one.p,
                "p_holm": p_holm.get((group, name)),
            }
            for name, one in by_model.items()
        }
        for group, by_model in compared.items()
    }
