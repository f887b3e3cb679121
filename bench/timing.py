"""Interleaved timing: every call in turn, round after round, so that a busy minute falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Clock = Literal["cpu", "wall"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What one call took in every round, in seconds by both clocks."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def of(self, clock: Clock) -> list[float]:
        """Return the samples of one clock."""
        return self.cpu_s if clock == "cpu" else self.wall_s

    def median_s(self, clock: Clock = "cpu") -> float:
        """Return the median by one clock."""
        return statistics.median(self.of(clock))


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The median over rounds, and the quartiles."""

    median: float
    low: float
    high: float


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Samples]:
    """Time the calls in turn, `rounds` times after one warm-up of each."""
    samples = {name: Samples() for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            samples[name].cpu_s.append(time.process_time() - cpu)
            samples[name].wall_s.append(time.perf_counter() - wall)
    return samples


def ratio(samples: dict[str, Samples], slow: str, fast: str, clock: Clock = "cpu", times: float = 1.0) -> Spread:
    """Return one call's time over another's in the same round; `times` is how often `fast` did the work of `slow`."""
    return spread([times * a / b for a, b in zip(samples[slow].of(clock), samples[fast].of(clock), strict=True)])


def rate(samples: Samples, work: float, clock: Clock = "cpu") -> Spread:
    """Return work a second: the median of the rounds, and their quartiles."""
    return spread([work / seconds for seconds in samples.of(clock)])


def spread(values: list[float]) -> Spread:
    """Return median and quartiles; of a single value, itself."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(median=statistics.median(values), low=low, high=high)


def peak_rss_mib() -> float:
    """Return this process's largest resident size so far."""
    # Not getrusage: its maximum survives exec, so that a child would start with its parent's.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
