"""`bench/gpu.sh` with stand-ins for its programs: what it runs, that nothing stops it, and that its time is bounded."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.sh"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout, a Python that notes its calls in `calls` and fails those that match `fails`, and Nsight Compute."""
    (tmp_path / "tree" / "bench" / "wheels").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "tree" / "bench" / "gpu.sh")
    (tmp_path / "tree" / "bench" / "wheels" / "a.whl").touch()
    (tmp_path / "fails").write_text("nothing")
    for name in ("python3", "ncu"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "{name} [$PYTHONSAFEPATH] $*" | tee -a {tmp_path}/calls | grep -qvf {tmp_path}/fails\n'
        )
        program.chmod(0o755)
    return tmp_path


def _run(machine: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    path = f"{machine}:/usr/bin:/bin"
    (machine / "tmp").mkdir()
    done = subprocess.run(
        [machine / "tree" / "bench" / "gpu.sh", machine / "out.json"],
        env={"PATH": path, "TMPDIR": str(machine / "tmp")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, (machine / "calls").read_text().splitlines()


def test_it_runs_everything_and_leaves_nothing(machine: Path) -> None:
    """Catches a process that finds the checkout, which has no engine, before what was built."""
    done, calls = _run(machine)
    assert (done.returncode, done.stderr) == (0, "")
    assert any("--target" in call and call.endswith("a.whl") for call in calls)
    ran = [call for call in calls if "pip install" not in call]
    assert [call.split()[2] for call in ran] == ["-c", "bench/loss_gpu.py", "-m", "--clock-control"]
    assert all("[1]" in call for call in ran)
    assert not list((machine / "tmp").iterdir())


@pytest.mark.parametrize("fails", ["import fusechat._native", "bench/loss_gpu.py --json", "-m pytest"])
def test_a_step_that_fails_is_told_and_the_next_one_runs(machine: Path, fails: str) -> None:
    """Catches minutes on a lent machine that end at the first mistake."""
    (machine / "fails").write_text(fails)
    done, calls = _run(machine)
    assert done.returncode == (0 if "import" in fails else 1)  # without an engine one is built
    assert any(call.endswith("no-build-isolation .") for call in calls) == ("import" in fails)
    assert "--clock-control" in calls[-1]


def test_its_limits_stay_below_ten_minutes() -> None:
    limits = re.findall(r"\bwithin (\d+) ", SCRIPT.read_text())
    assert len(limits) == 4
    assert sum(map(int, limits)) <= 550


def test_a_step_that_takes_too_long_is_told(machine: Path) -> None:
    text = (machine / "tree" / "bench" / "gpu.sh").read_text().replace("within 290 ", "within 0.1 ")
    (machine / "tree" / "bench" / "gpu.sh").write_text(text)
    program = machine / "python3"
    program.write_text(program.read_text() + 'case "$*" in *loss_gpu*) sleep 5 ;; esac\n')
    done, calls = _run(machine)
    assert done.returncode == 1
    assert done.stderr == "gpu.sh: not done within 0.1 s\n"
    assert "--clock-control" in calls[-1]
