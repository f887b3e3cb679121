"""Intervals of figures that take a fit, from fits without one group of units at a time.

A bootstrap asks for thousands of fits; the delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17) for
as many as there are groups: se² = (G − 1)/G · Σ (θ₋g − θ̄₋)², and Student's t with G − 1 degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.evaluate.bootstrap import Interval, holm

N_GROUPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Refitted:
    """A figure of all units, and the same without each group of them, float64[groups]."""

    whole: float
    without: npt.NDArray[np.float64]

    def minus(self, other: Refitted) -> Refitted:
        """Return the difference to a figure of the same groups."""
        return Refitted(whole=self.whole - other.whole, without=self.without - other.without)

    def interval(self, confidence: float) -> Interval:
        """Return the figure with its bounds."""
        from scipy.stats import t

        half = float(t.ppf((1 + confidence) / 2, len(self.without) - 1)) * self._error
        return Interval(value=self.whole, low=self.whole - half, high=self.whole + half)

    @property
    def p(self) -> float:
        """The two-sided p-value of the figure being 0."""
        from scipy.stats import t

        return float(2 * t.sf(abs(self.whole) / self._error, len(self.without) - 1)) if self._error else 1.0

    @property
    def _error(self) -> float:
        n = len(self.without)
        return float(np.sqrt((n - 1) / n * np.square(self.without - self.without.mean()).sum()))


def without_groups(
    figure: Callable[[npt.NDArray[np.int64]], float], n_units: int, *, seed: int
) -> npt.NDArray[np.float64]:
    """Return `figure(units)` without each of N_GROUPS groups in turn; one seed gives every figure the same groups."""
    shuffled = np.random.default_rng(seed).permutation(n_units)
    groups = [shuffled[g::N_GROUPS] for g in range(min(N_GROUPS, n_units))]
    return np.array([figure(np.setdiff1d(shuffled, group)) for group in groups])


def jackknife_table(
    figures: Mapping[str, Refitted], *, value_name: str, against: str, confidence: float
) -> dict[str, dict[str, Any]]:
    """Return by model, in comparison_table's form, the figure and its paired difference to the model `against`."""
    differences = {name: one.minus(figures[against]) for name, one in figures.items() if name != against}
    p_holm = dict(zip(differences, holm([one.p for one in differences.values()]), strict=True))
    return {
        name: {
            value_name: one.interval(confidence).triple(),
            f"difference_to_{against}": one.minus(figures[against]).interval(confidence).triple(),
            "p": None if name == against else differences[name].p,
            "p_holm": p_holm.get(name),
        }
        for name, one in figures.items()
    }
