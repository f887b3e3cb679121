"""The hot functions of compiled code, by `perf`: in a child process, from the stage's first instruction to its last."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FREQUENCY = "997"
_ROW = re.compile(r"^\s*(\d+\.\d+)%\s+(\S+)\s+\[([.k])\]\s+(.+?)\s*$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function's share of the samples, and the library it is in."""

    share: float
    library: str
    name: str


def perf_missing() -> str | None:
    """Return why there is no perf to ask, in one line; None where there is one."""
    if shutil.which("perf") is None:
        return "perf is not installed: the functions of the compiled engine are not told apart"
    done = subprocess.run(
        ["perf", "record", "-e", "cpu-clock", "-o", "/dev/null", "--", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return f"perf may not record here ({(done.stderr.strip() or 'no reason given').splitlines()[0]})"
    return None


def record(arguments: Sequence[str], data: Path) -> int:
    """Run `python ARGUMENTS` under perf and return its exit code."""
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", _FREQUENCY, "-g", "-o", str(data), "--"]
    return subprocess.run([*command, sys.executable, *arguments], check=False).returncode


def hot_functions(data: Path, limit: int = 12) -> list[Function]:
    """Return the functions that took most samples of a recording."""
    report = subprocess.run(
        ["perf", "report", "-i", str(data), "--stdio", "--no-children", "-g", "none", "-F", "overhead,dso,symbol"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return parse_report(report)[:limit]


def parse_report(report: str) -> list[Function]:
    """Return the rows of `perf report --stdio -F overhead,dso,symbol`, in its order."""
    found = []
    for line in report.splitlines():
        match = _ROW.match(line)
        if match:
            name = match[4].split("(")[0] if "(" in match[4] and not match[4].startswith("(") else match[4]
            found.append(Function(share=float(match[1]) / 100, library=match[2], name=name))
    return found
