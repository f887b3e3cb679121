"""What every benchmark shares: interleaved timing, claims with a verdict, and the environment they were measured in."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import fusechat


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One line of a benchmark's result; a value of None was not measured, which is never a pass."""

    name: str
    against: str
    value: float | None
    unit: str
    to_reach: str
    holds: bool | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return reached, short, or not measured."""
        return {True: "reached", False: "short", None: "not measured"}[self.holds]


def at_most(name: str, against: str, value: float, limit: float, unit: str = "×", note: str = "") -> Claim:
    """Claim that a cost is at most `limit`."""
    return Claim(
        name=name, against=against, value=value, unit=unit, to_reach=f"≤ {limit:g}", holds=value <= limit, note=note
    )


def at_least(name: str, against: str, value: float, limit: float, unit: str = "×", note: str = "") -> Claim:
    """Claim that a gain is at least `limit`."""
    return Claim(
        name=name, against=against, value=value, unit=unit, to_reach=f"≥ {limit:g}", holds=value >= limit, note=note
    )


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Time the calls in turn, `rounds` times after one warm-up; CPU-seconds, so that a busy machine skews nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return the median over rounds of one call's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast]))


def peak_rss_mib() -> float:
    """Return this process's largest resident size so far."""
    # Not getrusage: its maximum survives exec, so that a child would start with its parent's.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def environment() -> dict[str, object]:
    """Return what the figures depend on."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "fusechat": fusechat.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def report(claims: list[Claim], options: argparse.Namespace) -> int:
    """Print a line per claim and write JSON if asked; return 1 if --check is on and a claim fell short."""
    for claim in claims:
        value = "–" if claim.value is None else f"{claim.value:.2f} {claim.unit}"
        verdict = f"{claim.to_reach:<8} {claim.verdict}  {claim.note}".rstrip()
        print(f"{claim.name:<44} against {claim.against:<36} {value:>12}  {verdict}")
    if options.json:
        result = {"environment": environment(), "claims": [{**asdict(c), "verdict": c.verdict} for c in claims]}
        Path(options.json).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return int(options.check and any(claim.holds is False for claim in claims))


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", metavar="OUT", help="write claims and environment there")
    options.add_argument("--check", action="store_true", help="exit 1 when a claim falls short")
    return options
