"""What a benchmark says: one claim a line, with its spread, its cost and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusechat.bench.timing import Samples, Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one call has to move and to compute at least, counted and not measured, and what it took."""

    seconds: float
    n_bytes: float
    n_flops: float = 0.0
    dtype: str = "float32"
    """Whose matrix product is the ceiling: float32 or bfloat16."""

    @classmethod
    def of(cls, samples: Samples, n_bytes: float, n_flops: float = 0.0, dtype: str = "float32") -> Work:
        """Take the median wall time of a call."""
        return cls(seconds=samples.median_s("wall"), n_bytes=n_bytes, n_flops=n_flops, dtype=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One line of a benchmark's result; a value of None was not measured, which is never a pass."""

    name: str
    against: str
    value: float | None
    unit: str
    to_reach: str
    holds: bool | None
    higher_is_better: bool = True
    low: float | None = None
    high: float | None = None
    cpu_s: float | None = None
    wall_s: float | None = None
    peak_mib: float | None = None
    work: Work | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return reached, short, measured (nothing was claimed), or not measured."""
        if self.value is None:
            return "not measured"
        return {True: "reached", False: "short", None: "measured"}[self.holds]


def at_most(name: str, against: str, value: float | Spread, limit: float | None, unit: str = "×", **said: Any) -> Claim:
    """Claim that a cost is at most `limit`; without a limit the cost is only stated. `said` is `note`, `work`, …"""
    holds = None if limit is None else _number(value) <= limit
    return _claim(name, against, value, unit, "" if limit is None else f"≤ {limit:g}", holds, False, **said)


def at_least(
    name: str, against: str, value: float | Spread, limit: float | None, unit: str = "×", **said: Any
) -> Claim:
    """Claim that a gain is at least `limit`; without a limit the gain is only stated. `said` is `note`, `work`, …"""
    holds = None if limit is None else _number(value) >= limit
    return _claim(name, against, value, unit, "" if limit is None else f"≥ {limit:g}", holds, True, **said)


def absent(name: str, against: str, to_reach: str, why: str) -> Claim:
    """State that something was not measured, and why."""
    return Claim(name=name, against=against, value=None, unit="", to_reach=to_reach, holds=None, note=why)


def _number(value: float | Spread) -> float:
    return value.median if isinstance(value, Spread) else float(value)


def _claim(
    name: str,
    against: str,
    value: float | Spread,
    unit: str,
    to_reach: str,
    holds: bool | None,
    higher_is_better: bool,
    *,
    note: str = "",
    samples: Samples | None = None,
    peak_mib: float | None = None,
    work: Work | None = None,
) -> Claim:
    spread = value if isinstance(value, Spread) else None
    return Claim(
        name=name,
        against=against,
        value=_number(value),
        unit=unit,
        to_reach=to_reach,
        holds=holds,
        higher_is_better=higher_is_better,
        low=spread.low if spread else None,
        high=spread.high if spread else None,
        cpu_s=samples.median_s("cpu") if samples else None,
        wall_s=samples.median_s("wall") if samples else None,
        peak_mib=peak_mib,
        work=work,
        note=note,
    )
