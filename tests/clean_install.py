"""Installs the wheel into clean environments and merges two models there, without this folder in sight.

    python tests/clean_install.py

Every Python of VERSIONS that is at hand takes part. Torch is left out: merging does not need it, and its wheels are
gigabytes on some indexes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12")
NEEDED = ["numpy", "pydantic", "pyyaml", "rich", "typer", "safetensors", "jinja2"]
PROBE = """
import json, pathlib, subprocess, sys
import numpy as np
from safetensors.numpy import load_file, save_file
import fusechat, fusechat._native, fusechat.kernels, fusechat.bench
assert "site-packages" in fusechat.__file__, fusechat.__file__
for i, name in enumerate(("one", "two")):
    folder = pathlib.Path(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 7}))
    save_file({"w.weight": np.full((4, 8), float(i + 1), np.float32)}, folder / "model.safetensors")
pathlib.Path("merge.yml").write_text(
    "merge_method: linear\\nmodels: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: 3}}]\\n"
)
subprocess.run([sys.executable, "-m", "fusechat", "merge", "merge.yml", "out"], check=True)
merged = load_file("out/model.safetensors")["w.weight"]
assert (merged == 1.75).all(), merged
print(f"the wheel of fusechat {fusechat.__version__} works on Python {sys.version.split()[0]}")
"""


def interpreters() -> dict[str, str]:
    """Return a Python of every version that is at hand, on the path or among pyenv's."""
    found = {}
    for version in VERSIONS:
        candidates = [
            f"python{version}",
            *map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))),
        ]
        for candidate in candidates:
            try:
                said = subprocess.run([candidate, "-V"], capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):
                continue  # absent, or a shim of a version that is not active
            if said.startswith(f"Python {version}."):
                found[version] = candidate
                break
    return found


def try_on(version: str, python: str) -> None:
    """Build the wheel for one Python, install it in a new environment and merge there."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([python, "-m", "venv", folder / "env"], check=True)
        clean = str(folder / "env" / "bin" / "python")
        pip = [clean, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        build = [*pip, "wheel"]
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            # This environment has what builds the wheel, and the engine compiled.
            build = [sys.executable, *pip[1:], "wheel", "--no-build-isolation"]
        subprocess.run([*build, "--no-deps", "--wheel-dir", folder / "dist", ROOT], check=True)
        (wheel,) = (folder / "dist").glob("fusechat-*.whl")
        subprocess.run([*pip, "install", *NEEDED], check=True)
        subprocess.run([*pip, "install", "--no-deps", wheel], check=True)
        work = folder / "work"
        work.mkdir()
        subprocess.run([clean, "-c", PROBE], cwd=work, check=True)


def main() -> int:
    """Try every interpreter at hand; say which were not."""
    pythons = interpreters()
    for version, python in pythons.items():
        try_on(version, python)
    if len(pythons) < len(VERSIONS):
        print(f"tried {len(pythons)} of Python {', '.join(VERSIONS)}: the others are not at hand")
    return 0 if pythons else 1


if __name__ == "__main__":
    sys.exit(main())
