"""`.ci/run` on a machine of stand-ins: what it installs, in which order it works, and that nothing red passes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "dirname", "mktemp", "tail", "cat", "rm")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout beside a folder of commands that note their calls in `calls`; `fails` names one that does not pass."""
    (tmp_path / "tree" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "tree" / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / "bin" / tool).symlink_to(found)
    noted = f'echo "${{0##*/}} $*" >> {tmp_path}/calls\n'
    fails = f'[ "${{0##*/}} $*" != "$(cat {tmp_path}/fails)" ]\n'
    (tmp_path / "fails").touch()
    _command(tmp_path / "bin" / "id", "echo 0\n")
    for command in (tmp_path / "bin" / "make", tmp_path / "bin" / "apt-get", tmp_path / "tree" / ".ci" / "sanitize"):
        _command(command, noted + fails)
    return tmp_path


def _command(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def _run(machine: Path) -> tuple[int, list[str]]:
    done = subprocess.run(
        [machine / "tree" / ".ci" / "run"], env={"PATH": str(machine / "bin")}, capture_output=True, check=False
    )
    return done.returncode, (machine / "calls").read_text().splitlines()


def test_a_browser_is_installed_where_there_is_none(machine: Path) -> None:
    """Catches the report's tests in a browser that never ran."""
    returncode, calls = _run(machine)
    assert returncode == 0
    assert "apt-get install -y -qq chromium chromium-driver" in calls
    assert calls.index("make setup") < calls.index("make test") < calls.index("make lint") < calls.index("sanitize ")
    assert "make test-vllm" in calls
    for has, lacks in (("chromium", True), ("chromedriver", False)):  # a test needs both
        (machine / "calls").unlink()
        _command(machine / "bin" / has, "")
        returncode, calls = _run(machine)
        assert returncode == 0
        assert bool([call for call in calls if call.startswith("apt-get")]) == lacks


@pytest.mark.parametrize("fails", ["make test", "make setup-vllm", "make test-vllm", "sanitize ", "make bench-check"])
def test_what_fails_fails_the_run(machine: Path, fails: str) -> None:
    """Catches a lane beside the others whose failure nobody sees."""
    (machine / "fails").write_text(fails)
    assert _run(machine)[0] != 0


def test_no_browser_to_be_had_is_no_failure(machine: Path) -> None:
    (machine / "fails").write_text("apt-get update -qq")
    assert _run(machine)[0] == 0
