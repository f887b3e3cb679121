"""One stage under the profilers: a trace, a memory timeline, a summary against ceilings measured in the same run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusechat.artifact import Json
from fusechat.config import RunConfig
from fusechat.errors import ConfigError, MismatchError
from fusechat.profile.native import Function, hot_functions, perf_missing, record, sampled
from fusechat.profile.piece import Piece, prepare, size_bytes
from fusechat.profile.summary import OUTSIDE, Line, summarise
from fusechat.profile.trace import memory_timeline, read_operators

TORCH_STAGES = ("extract", "train")
SAMPLED_S = 3.0


def profile_torch(stage: str, config: RunConfig, out: Path, dialogues: int) -> tuple[list[Line], Json]:
    """Run a piece of a stage under torch.profiler; write trace.json and memory.csv to `out`; return its summary.

    The facts are wall seconds, the most bytes torch held, and the ceilings.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from fusechat.bench.machine import ceilings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with tempfile.TemporaryDirectory() as temporary:
        piece = prepare(stage, config, Path(temporary) / "work", dialogues)
        _run_unseen(piece, Path(temporary))
        started = time.perf_counter()
        with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler, record_function(
            f"fusechat {stage}"
        ):  # fmt: skip
            piece.run(Path(temporary) / "out")
        seconds = time.perf_counter() - started
    trace = out / "trace.json"
    profiler.export_chrome_trace(str(trace))
    timeline = memory_timeline(trace)
    rows = "".join(f"{at:.6f},{size}\n" for at, size in timeline)
    (out / "memory.csv").write_text("seconds,bytes\n" + rows)
    found = ceilings(device)
    outside = f"fusechat {stage}"  # what is left of the stage's own range, on a CPU: a GPU's time is its kernels'
    operators = [replace(o, name=OUTSIDE) if o.name == outside else o for o in read_operators(trace)]
    dtype = config.train.dtype if stage == "train" else config.extract.dtype
    facts: Json = {
        "stage": stage,
        "device": device,
        "seconds": seconds,
        "peak_tensor_bytes": max((size for _, size in timeline), default=0),
        "ceilings": found,
    }
    return summarise(operators, found, "float32" if dtype == "auto" and device == "cpu" else dtype), facts


def profile_native(
    stage: str, config_path: str, overrides: list[str], out: Path, dialogues: int
) -> tuple[list[Function] | str, Json]:
    """Run a piece of a stage in a child, under perf where there is one; return its hot functions and what it did.

    The functions are a sentence where perf is missing. What it did: `seconds` of one call, how often it was called,
    the bytes that it must read and write, and its `amount` in `unit`s.
    """
    facts_path = out / "piece.json"
    arguments = ["-m", "fusechat.profile.stage", str(facts_path), stage, str(dialogues), config_path, *overrides]
    reason = perf_missing()
    if reason is None:
        failed = record(arguments, out / "perf.data")
    else:
        failed = subprocess.run([sys.executable, *arguments], check=False).returncode
    if failed:
        raise ConfigError(f"fusechat profile {stage}: the stage failed; its own message stands above")
    facts: Json = json.loads(facts_path.read_text())
    facts_path.unlink()
    return reason if reason is not None else hot_functions(out / "perf.data"), facts


def ncu_command(stage: str, config_path: str, overrides: list[str], out: Path, dialogues: int) -> str:
    """Return the command line that profiles the stage's CUDA kernels with Nsight Compute, inside its NVTX range."""
    inner = [sys.executable, "-m", "fusechat.profile.stage", "-", stage, str(dialogues), config_path, *overrides]
    nvtx = ["--nvtx", "--nvtx-include", f"fusechat {stage}/"]
    return shlex.join(["ncu", *nvtx, "--set", "full", "-o", str(out / "ncu"), *inner])


def run_piece(stage: str, config: RunConfig, dialogues: int, sampled_s: float) -> Json:
    """Run a piece of a stage in an NVTX range, for profilers from outside, and return what it did.

    Once unseen and then for `sampled_s` seconds, at least once: the first call is all imports, first touch and start.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        piece = prepare(stage, config, folder / "work", dialogues)
        _run_unseen(piece, folder)
        with sampled():
            started, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - started < sampled_s:
                in_range(stage, lambda out=folder / f"out-{calls}": piece.run(out))  # type: ignore[misc]
                calls += 1
            seconds = (time.perf_counter() - started) / calls
        return {
            "seconds": seconds,
            "calls": calls,
            "read_bytes": sum(map(size_bytes, piece.reads)),
            "written_bytes": size_bytes(folder / "out-0") if piece.reads else 0,
            "amount": piece.amount,
            "unit": piece.unit,
        }


def _run_unseen(piece: Piece, folder: Path) -> None:
    if piece.in_this_process:
        piece.run(folder / "unseen")


def in_range(stage: str, run: Callable[[], Any]) -> None:
    """Call within the NVTX range "fusechat STAGE" where there is a GPU."""
    if stage not in TORCH_STAGES:
        run()
        return
    import torch

    if not torch.cuda.is_available():
        run()
        return
    with torch.cuda.nvtx.range(f"fusechat {stage}"):
        run()
        torch.cuda.synchronize()


def write_summary(out: Path, facts: Json) -> None:
    """Write what was found as JSON beside the trace."""
    (out / "summary.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def fresh_folder(out: Path) -> None:
    """Empty a folder of an earlier profile; raises FusechatError when it holds something else."""
    ours = {"trace.json", "memory.csv", "summary.json", "perf.data", "perf.data.old", "ncu.ncu-rep"}
    if out.exists():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in ours)
        if foreign:
            raise MismatchError(
                f"{out} holds {foreign[0]}, which is no profile of ours: choose another place with --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)


if __name__ == "__main__":
    from fusechat.config import load_config

    for_perf = sys.argv[1] != "-"  # Nsight Compute replays every kernel: one call is much
    settings = load_config(sys.argv[4], sys.argv[5:])
    done = run_piece(sys.argv[2], settings, int(sys.argv[3]), SAMPLED_S if for_perf else 0.0)
    if for_perf:
        Path(sys.argv[1]).write_text(json.dumps(done))
