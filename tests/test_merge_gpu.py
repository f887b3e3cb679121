"""`--device cuda` without a GPU: the kernels under the interpreter, their machine code, and the line a user gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from merge_family import make_family, recipe

from fusechat import gpu_merge
from fusechat.errors import ConfigError
from fusechat.merge import merge

TESTS = Path(__file__).parent


def test_results_under_the_interpreter() -> None:
    """Runs sce_checks.py by itself: the interpreter replaces the compiler for a whole process."""
    pytest.importorskip("triton", reason="Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-x", str(TESTS / "sce_checks.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


SLOWER = [
    pytest.param(target, dtype, marks=pytest.mark.slow)
    for target, dtype in ((80, "bf16"), (100, "bf16"), (80, "fp32"), (90, "fp32"), (100, "fp32"))
]


@pytest.mark.parametrize(("target", "dtype"), [(90, "bf16"), *SLOWER])
def test_machine_code_neither_spills_nor_narrows_its_loads(
    tmp_path_factory: pytest.TempPathFactory, target: int, dtype: str
) -> None:
    """Catches what no result shows, for five targets; the loads of a block that is 16-byte aligned are wide."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    gate = pytest.importorskip("fusechat.profile.gate", reason="Triton's NVIDIA tools are not here")
    from fusechat.profile.compiled import blocks_per_sm

    for name, found in gate.compile_sce(dtype, target).items():
        assert found.spills == 0, f"{name} spills {found.spills}"
        assert found.wide_loads >= 1, f"{name} has no wide load"
        room = blocks_per_sm(found, gate.sce.WARPS, target)
        assert room >= 2, f"{name} takes {found.registers} registers: {room} programs on a multiprocessor"


def test_without_a_gpu_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a silent merge on the CPU, and methods or inputs the kernels do not know."""
    family = make_family(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no CUDA device"):
        merge(recipe(family), tmp_path / "out", device="cuda")
    with pytest.raises(ConfigError, match="merges sce only, not linear"):
        merge(recipe(family, "linear"), tmp_path / "out", device="cuda")
    with pytest.raises(ConfigError, match="exclude each other"):
        merge(recipe(family), tmp_path / "out", device="cuda", ray="local")
    config = recipe(family)
    config["models"][0]["model"] += "+adapter"
    with pytest.raises(ConfigError, match="does not stream adapters"):
        merge(config, tmp_path / "out", device="cuda")
    assert not list(tmp_path.glob("out*"))


def test_require_gpu_passes_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a refusal that does not look."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpu_merge.require_gpu()
