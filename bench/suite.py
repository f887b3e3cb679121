"""The benchmarks by name: each runs in a process of its own, so that its memory is its own; results are joined."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusechat.bench.peers import check_against
from fusechat.errors import ConfigError

MODULES = {
    "align": "align",
    "extract": "extract",
    "linear-loss": "linear_loss",
    "loss": "loss",
    "merge": "merge",
    "plan": "plan",
    "store": "store",
    "train": "train",
}
CUDA_MODULES = {"loss": "loss_gpu", "linear-loss": "loss_gpu"}


def run_benchmarks(
    names: Sequence[str], device: str, size: str, against: Sequence[str] = (), *, tables: bool = True
) -> dict[str, Any]:
    """Run the named benchmarks one after another, each at `size` and against the same peers; return the joined result.

    Their tables go to stdout, to stderr without `tables`.

    Raises ConfigError for a name that is none, for one that has no form on `device`, for a peer that is none, and when
    a benchmark fails.
    """
    check_against(against)
    arguments = ["--size", size, *(word for peer in against for word in ("--against", peer))]
    modules = CUDA_MODULES if device == "cuda" else MODULES
    wanted = list(modules) if "all" in names else list(names)
    for name in wanted:
        if name not in modules:
            known = ", ".join((*modules, "all"))
            raise ConfigError(f"no benchmark {name!r} on {device}; there are: {known}")
    joined: dict[str, Any] = {}
    for module in dict.fromkeys(modules[name] for name in wanted):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "result.json"
            command = [
                sys.executable,
                "-m",
                f"fusechat.bench.{module}",
                "--device",
                device,
                "--json",
                str(out),
                *arguments,
            ]
            code = subprocess.run(command, check=False, stdout=None if tables else sys.stderr).returncode
            if not out.exists():
                raise ConfigError(
                    f"bench/{module}.py ended with exit code {code} and no result; its own message stands above"
                )
            result = json.loads(out.read_text())
        joined = joined or result | {"claims": []}
        joined["claims"] += result["claims"]
        joined["ceilings"] = result["ceilings"] | joined["ceilings"]
    return joined
