"""The hot functions of compiled code, by `perf`: in a child process, of the stage and not of what it needs first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_FREQUENCY = "997"
_CONTROL = "FUSECHAT_PERF_CONTROL"
_ROW = re.compile(r"^\s*(\d+\.\d+)%\s+(\S+)\s+\[([.k])\]\s+(.+?)\s*$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function's share of the samples, and the library it is in."""

    share: float
    library: str
    name: str

    @property
    def room(self) -> str:
        """Return whose code it is: the engine's, Python's, the kernel's, libc's or another library's."""
        if self.library.startswith("["):
            return "kernel"
        if self.library.startswith("_native"):
            return "engine"
        if "python" in self.library:
            return "Python"
        return "libc" if self.library.startswith("libc.so") else "libraries"


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
    """Run `python ARGUMENTS` under perf and return its exit code; what it does under `sampled` is sampled."""
    with tempfile.TemporaryDirectory() as temporary:
        control, acknowledge = (str(Path(temporary) / name) for name in ("control", "acknowledge"))
        for fifo in (control, acknowledge):
            os.mkfifo(fifo)
        command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", _FREQUENCY, "-g", "-o", str(data)]
        command += ["-D", "-1", "--control", f"fifo:{control},{acknowledge}", "--", sys.executable, *arguments]
        environment = os.environ | {_CONTROL: f"{control},{acknowledge}"}
        return subprocess.run(command, env=environment, check=False).returncode


@contextmanager
def sampled() -> Iterator[None]:
    """Let the perf this process runs under, if any, sample the block and nothing else.

    What comes before are imports and the stages that are needed first; what comes after is the end of an interpreter
    that holds torch, whose last garbage collection is longer than a small stage.
    """
    _tell_perf("enable")
    yield
    _tell_perf("disable")


def _tell_perf(word: str) -> None:
    if _CONTROL not in os.environ:
        return
    control, acknowledge = os.environ[_CONTROL].split(",")
    Path(control).write_text(word + "\n")
    with open(acknowledge, encoding="ascii") as answer:
        answer.readline()


ROOMS = {
    "engine": "perf annotate the function: loads, branches, what is not vectorised",
    "Python": "more dialogues or a larger model first; if it stays: py-spy, a loop to move",
    "kernel": "first touch of pages, files read and written: fewer and larger buffers",
    "libc": "copies and allocation: reuse buffers",
    "libraries": "the shapes they are called with: larger, aligned",
}
"""Whose code it is, and what to look at next when most of the time is there."""


def by_room(functions: Sequence[Function]) -> dict[str, float]:
    """Return the share of each room, the largest first."""
    shares = dict.fromkeys(ROOMS, 0.0)
    for function in functions:
        shares[function.room] += function.share
    return {room: share for room, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= 0.005}


def hot_functions(data: Path) -> list[Function]:
    """Return the functions of a recording, those that took most samples first."""
    report = subprocess.run(
        ["perf", "report", "-i", str(data), "--stdio", "--no-children", "-g", "none", "-F", "overhead,dso,symbol"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return parse_report(report)


def parse_report(report: str) -> list[Function]:
    """Return the rows of `perf report --stdio -F overhead,dso,symbol`, in its order."""
    found = []
    for line in report.splitlines():
        match = _ROW.match(line)
        if match:
            share, library, name = round(float(match[1]) / 100, 4), match[2], _without_arguments(match[4])
            found.append(Function(share=share, library=library, name=name))
    return found


def _without_arguments(name: str) -> str:
    """Return a demangled name up to its arguments; what lies in an anonymous namespace keeps its own."""
    plain = name.replace("(anonymous namespace)::", "")
    return plain.split("(")[0] or name
