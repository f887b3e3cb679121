"""What the stages of a run took: seconds, CPU-seconds, peak memory, in stages.jsonl; engines in processes of their own
count in (fusechat.usage).

One line when a process begins a stage and one when it has finished it, so that a stage that was killed shows: its first
line has no second. Stages that were found done do no work and leave no line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fusechat.artifact import Json
from fusechat.errors import FusechatError
from fusechat.reporter import Advance, Reporter
from fusechat.usage import Meter

_PACKAGES = ("fusechat", "torch", "transformers", "numpy", "triton", "vllm", "peft")


@dataclass(slots=True)
class _Work:
    unit: str
    wall: float
    meter: Meter
    first: int | None = None
    last: int = 0
    total: int = 0


class Ledger(Reporter):
    """Passes everything on to another reporter and writes down what each stage took."""

    def __init__(self, reporter: Reporter, path: Path) -> None:
        self.reporter = reporter
        self.path = path
        self.work: dict[str, _Work] = {}
        self.worked = False  # whether any stage had something to do

    def stage(self, name: str, unit: str) -> Advance:
        """Begin a stage."""
        advance = self.reporter.stage(name, unit)
        work = self.work[name] = _Work(unit, time.perf_counter(), Meter())
        began = _now()

        def advance_and_note(done: int, total: int) -> None:
            if work.first is None:
                work.first = done
                self.worked = True
                self._write({"event": "begin", "stage": name, "at": began, "environment": environment()})
            work.last, work.total = done, total
            advance(done, total)

        return advance_and_note

    def done(self, name: str, note: str) -> None:
        """Note a stage that did something."""
        work = self.work.pop(name, None)
        if work is not None and work.first is not None:
            self._write(
                {
                    "event": "end",
                    "stage": name,
                    "at": _now(),
                    "seconds": time.perf_counter() - work.wall,
                    "unit": work.unit,
                    "done": work.last,
                    "total": work.total,
                    **{key: value for key, value in asdict(work.meter.read()).items() if value is not None},
                    "note": note,
                }
            )
        self.reporter.done(name, note)

    def _write(self, line: Json) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * _is_cut(self.path) + json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            reason = error.strerror or str(error)
            raise FusechatError(
                f"cannot write {self.path}: {reason}; make room and run the same command again, it resumes"
            ) from error


def read_ledger(path: Path) -> list[Json]:
    """Return the lines of a ledger, oldest first; one that a kill or a full disk cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # cut within a character, too
            lines.append(json.loads(line))
    return lines


def _is_cut(path: Path) -> bool:
    """Return whether a file's last line has no end: the next one would be lost with it."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def environment() -> Json:
    """Return the machine and the versions that this process computes with."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    from fusechat import __version__

    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": _devices(),
        "versions": versions | {"fusechat": __version__},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _devices() -> list[str]:
    # Only where a stage has loaded torch: merging needs none.
    torch = sys.modules.get("torch")
    return [] if torch is None else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
