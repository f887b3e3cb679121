"""The peers and floors that benchmarks measure against, each in a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusechat.bench.peers import peer_python

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a process took: `cpu_s` is user and system time, `rss_bytes` its largest resident set."""

    cpu_s: float
    wall_s: float
    rss_bytes: int


def run_process(command: list[str]) -> Cost:
    """Run a command with one compute thread and no network, and return its cost; raises CalledProcessError."""
    # Both tools as they are installed: with their bytecode kept.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # RUSAGE_CHILDREN accumulates, and its maximum never falls: measure in a child of a child.
    probe = (
        "import json, resource, subprocess, sys, time\n"
        "began = time.perf_counter()\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)\n"
        "wall = time.perf_counter() - began\n"
        "if done.returncode: sys.exit(done.stderr.decode()[-2000:])\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *command], env=inherited | quiet, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-1000:]}")
    cpu, wall, rss = done.stdout.split()
    return Cost(cpu_s=float(cpu), wall_s=float(wall), rss_bytes=int(rss))


def mergekit_command(against: Sequence[str] = ()) -> Path | None:
    """Return mergekit's command: of the Python that --against names, of .venv-mergekit, or None where it is absent."""
    python = peer_python("mergekit", against)
    known = [Path(python).parent] if python else []
    commands = [folder / "mergekit-yaml" for folder in (*known, ROOT / ".venv-mergekit" / "bin")]
    return next((command for command in commands if command.exists()), None)


def mergekit(command: Path, recipe: Path, out: Path) -> Cost:
    """Merge with mergekit."""
    return run_process([str(command), str(recipe), str(out), "--no-copy-tokenizer"])


def fusechat_merge(recipe: Path, out: Path, threads: int = 1) -> Cost:
    """Merge with the command users run."""
    return run_process([sys.executable, "-m", "fusechat", "merge", str(recipe), str(out), "--threads", str(threads)])


def io_floor(inputs: list[Path], out: Path, out_bytes: int) -> Cost:
    """Read every input once and write the output's size once, in this process."""
    buffer = bytearray(1 << 20)
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with out.open("wb", buffering=0) as file:
        for begin in range(0, out_bytes, len(buffer)):
            file.write(memoryview(buffer)[: min(len(buffer), out_bytes - begin)])
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu_s=cpu, wall_s=time.perf_counter() - began, rss_bytes=0)
