"""What a process group has used, against what the kernel says of the same processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusechat.usage import Usage

ROOT = Path(__file__).resolve().parents[1]

# A process with a child that is waited for and one that is still there; both compute, the second holds memory.
FAMILY = """
import json, os, resource, subprocess, sys, time
from fusechat.usage import group_usage
def compute(seconds):
    while time.process_time() < seconds: pass
if len(sys.argv) > 1:
    block = bytearray(200 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    compute(0.5)
    print(time.process_time(), flush=True)
    sys.stdin.read()
else:
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.4: pass"])
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    beside = subprocess.Popen([sys.executable, __file__, "beside"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = float(beside.stdout.readline())
    compute(0.3)
    expected = time.process_time() + ended.ru_utime + ended.ru_stime + other
    found = group_usage()
    beside.communicate()
    print(json.dumps([expected, found.cpu_seconds, found.peak_memory_bytes, found.peak_device_bytes]))
"""


def test_a_group_is_all_its_processes_those_that_ended_too(tmp_path: Path) -> None:
    """Catches a group of one: vLLM computes in a child of the engine."""
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    expected, cpu_seconds, peak_memory_bytes, peak_device_bytes = json.loads(done.stdout)
    assert expected > 1.2
    assert cpu_seconds == pytest.approx(expected, abs=0.1)
    assert 200 << 20 < peak_memory_bytes < 1 << 30
    assert peak_device_bytes is None


def test_sums_add_memory_and_keep_the_fullest_device() -> None:
    one = Usage(cpu_seconds=1.0, peak_memory_bytes=10, peak_device_bytes=7)
    other = Usage(cpu_seconds=2.0, peak_memory_bytes=5, peak_device_bytes=9)
    assert one + other == Usage(cpu_seconds=3.0, peak_memory_bytes=15, peak_device_bytes=9)
    assert Usage() + Usage() == Usage()
    assert Usage() + one == one
