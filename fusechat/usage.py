"""What a stage uses: CPU-seconds, peak memory and peak device memory of this process and of the engines it starts.

An engine runs in a process group of its own. With every shard that it has made it tells what the group has used so far
(`group_usage`), and the process that started it counts that in (`count_engine`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

_PROC = Path("/proc")
_ENGINES: list[Usage] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one process or several have used; the sum of two is of both.

    `peak_memory_bytes` adds up the peaks of all processes, which they need not have had at the same time;
    `peak_device_bytes` is torch's, of the fullest device. Either is None where it is not known.
    """

    cpu_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None

    def __add__(self, other: Usage) -> Usage:
        memory = [n for n in (self.peak_memory_bytes, other.peak_memory_bytes) if n is not None]
        devices = [n for n in (self.peak_device_bytes, other.peak_device_bytes) if n is not None]
        return Usage(
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            peak_memory_bytes=sum(memory) if memory else None,
            peak_device_bytes=max(devices, default=None),
        )


class Meter:
    """Measures from now on: this process, and the engines that it starts."""

    def __init__(self) -> None:
        self._cpu_start = time.process_time()
        self._first_engine = len(_ENGINES)
        with contextlib.suppress(OSError):
            (_PROC / "self" / "clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew from what is held now
        for device in _devices():
            sys.modules["torch"].cuda.reset_peak_memory_stats(device)

    def read(self) -> Usage:
        """Return what was used since the beginning."""
        own = Usage(
            cpu_seconds=time.process_time() - self._cpu_start,
            peak_memory_bytes=_peak_memory_bytes("self"),
            peak_device_bytes=_peak_device_bytes(),
        )
        return reduce(add, _ENGINES[self._first_engine :], own)


def count_engine() -> Callable[[Usage], None]:
    """Count an engine in from now on; what is returned takes its usage so far, again and again."""
    place = len(_ENGINES)
    _ENGINES.append(Usage())

    def told(usage: Usage) -> None:
        _ENGINES[place] = usage

    return told


def group_usage() -> Usage:
    """Return what this process's group has used since it began, processes that have ended and were waited for too.

    Device memory is this process's own: vLLM keeps its tensors in another one.
    """
    group = str(os.getpgid(0))
    ticks = os.sysconf("SC_CLK_TCK")
    used = Usage(peak_device_bytes=_peak_device_bytes())
    for process in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # pid (name) state ppid pgrp ... utime stime cutime cstime are fields 14 to 17; see proc(5).
            fields = (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[2] == group:
                cpu_seconds = sum(map(int, fields[11:15])) / ticks
                used += Usage(cpu_seconds=cpu_seconds, peak_memory_bytes=_peak_memory_bytes(process.name))
    return used


def _peak_memory_bytes(process: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in (_PROC / process / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None


def _devices() -> range:
    # Only where torch is at work already: asking would load it, or take memory on every device.
    torch = sys.modules.get("torch")
    return range(torch.cuda.device_count() if torch is not None and torch.cuda.is_initialized() else 0)


def _peak_device_bytes() -> int | None:
    return max((int(sys.modules["torch"].cuda.max_memory_allocated(i)) for i in _devices()), default=None)
