"""The machine a figure belongs to, and its ceilings: memory copy, matrix product, disk, measured in the same run."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fusechat

CORES = len(os.sched_getaffinity(0))  # at first: some benchmarks bind themselves to one
COPY_BYTES = 256 << 20
DISK_BYTES = 256 << 20
GEMM_SIZE = 2048
SLOW_GEMM_SIZE = 512  # where a machine multiplies a type by loops: bf16 on a CPU without instructions for it
SLOW_GFLOP_S = 10.0
LEVELS = {
    "x86-64-v4-amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "amx_bf16"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi2", "fma"},
}


def environment(device: str = "cpu") -> dict[str, object]:
    """Return what the figures depend on: versions, processor, cores, load, date."""
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
        "instruction_set": instruction_set(),
        "cores": CORES,
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_name(environment: dict[str, object]) -> str:
    """Return the name under which figures of one machine are kept together.

    A virtual machine's processor may be called the same in every generation; its instruction set tells them apart.
    """
    if environment.get("gpu"):
        return str(environment["gpu"])
    name = f"{environment['cores']} × {environment['cpu']}"
    level = environment.get("instruction_set")
    return f"{name} ({level})" if level else name


def ceilings(device: str = "cpu", rounds: int = 5) -> dict[str, float]:
    """Return the best of some rounds: copy in GB/s (read and write counted), fp32 and bf16 products in GFLOP/s.

    Products are of 2,048 × 2,048; of 512 × 512 where those show that the type is multiplied by plain loops.
    """
    import torch

    values = torch.ones(COPY_BYTES // 4, device=device)
    copy = torch.empty_like(values)
    found = {"copy_gb_s": 2 * COPY_BYTES / _best_s(lambda: copy.copy_(values), rounds, device) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        for size in (SLOW_GEMM_SIZE, GEMM_SIZE):
            a = torch.ones(size, size, device=device, dtype=dtype)
            gflop_s = 2 * size**3 / _best_s(lambda a=a: a @ a, rounds, device) / 1e9
            if gflop_s < SLOW_GFLOP_S:
                break
        found[f"gemm_{str(dtype).removeprefix('torch.')}_gflop_s"] = gflop_s
    return found


def instruction_set() -> str:
    """Return what ratios depend on: x86-64-v2, -v3 (AVX2), -v4 (AVX-512) or -v4-amx; elsewhere the machine's kind.

    Levels are those of the x86-64 psABI, by the extensions that each is known for; AMX multiplies bf16.
    """
    if platform.machine() != "x86_64":
        return platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    for level, wanted in LEVELS.items():
        if wanted <= flags:
            return level
    return "x86-64-v2"


def disk_ceilings(folder: Path | None = None) -> dict[str, float]:
    """Measure what a file costs: written and synced, then read warm, in MB/s."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "probe"
        block = os.urandom(1 << 20)
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        read = time.perf_counter()
    return {
        "disk_write_mb_s": DISK_BYTES / (written - start) / 1e6,
        "disk_warm_read_mb_s": DISK_BYTES / (read - written) / 1e6,
    }


def _best_s(call: Callable[[], object], rounds: int, device: str) -> float:
    import torch

    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
