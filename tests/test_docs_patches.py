"""The patches of the how-to pages still apply, and what they add does what the pages say: in a copy of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

_native = pytest.importorskip("fusechat._native", reason="the compiled engine is not built")
ROOT = Path(__file__).resolve().parents[1]
PATCH = re.compile(r'^```diff title="[^"]+"\n(.*?)^```', re.M | re.S)


@pytest.fixture
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of sources and tests with a page's patch applied."""
    for folder in ("fusechat", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(str(_native.__file__), tmp_path / "fusechat")
    (patch,) = PATCH.findall((ROOT / "docs" / "howto" / request.param).read_text(encoding="utf-8"))
    done = subprocess.run(["git", "apply"], input=patch, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return tmp_path


def run_tests(copy: Path, *arguments: str) -> None:
    """Run tests of the copy with the copy's package: -S keeps the hook of an editable install out."""
    packages = sysconfig.get_paths()["purelib"]
    environment = os.environ | {"PYTHONPATH": f"{copy}:{copy / 'tests'}:{packages}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-S",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        *arguments,
    ]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("patched", ["add-divergence.md"], indirect=True)
def test_the_divergence_of_the_page_is_a_divergence(patched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a patch that has rotted, and a g that is not Q f'(Q)."""
    monkeypatch.setenv("FUSECHAT_LOSS", "torch")
    run_tests(patched, "tests/test_loss.py", "-k", "hellinger and definition and torch")
    compiler = shutil.which("g++")
    if compiler is not None:
        command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Icsrc", "csrc/loss/cells.cpp"]
        done = subprocess.run(command, cwd=patched, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("patched", ["add-merge-method.md"], indirect=True)
def test_the_merge_method_of_the_page_is_what_it_says(patched: Path) -> None:
    """Catches a patch that has rotted, and words for the engine that mean something else."""
    run_tests(patched, "tests/test_merge_methods.py", "-k", "agree")
