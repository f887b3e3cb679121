"""The Triton kernels without a GPU: results under the interpreter, and machine code for real architectures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
TESTS = Path(__file__).parent


def test_results_under_the_interpreter():
    """Runs kernel_checks.py by itself: the interpreter replaces the compiler for a whole process."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-x", str(TESTS / "kernel_checks.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    os.environ.setdefault("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    return pytest.importorskip("fusechat.profile.gate", reason="Triton's NVIDIA tools are not here")


def check(gate, variant, target) -> None:
    found = gate.compile_variant(variant, target)
    block, warps = variant.block_and_warps(target)
    assert found.spills == 0, f"{variant.name} spills {found.spills} on {target}"
    assert found.wide_loads >= 1, f"{variant.name} has no 128-bit load on {target}"
    if isinstance(target, int):
        assert gate.occupancy(found, warps, target) > 0, f"{variant.name}: {found.registers} registers"
        if not variant.extras:
            # One exponential an element and pass; a few more for the K cells and the running maximum.
            per_thread = block // (32 * warps)
            assert found.exponentials <= 4 * per_thread + 8 * max(1, variant.n_entries // 16) + 40


@pytest.mark.parametrize("index", [0, 1, 2])
def test_hopper_code_neither_spills_nor_narrows_its_loads(gate, index):
    """Catches a change that costs registers or breaks vectorisation, which no result shows."""
    check(gate, gate.VARIANTS[index], 90)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
def test_every_variant_compiles_within_its_means(gate, target):
    """Catches the same on the other architectures and for every specialisation."""
    for variant in gate.VARIANTS:
        if target == gate.AMD and (variant.n_entries == 128 or "ranges" in variant.name):
            continue  # the K × K comparison and the ranges spill there; the table says so
        check(gate, variant, target)


def test_an_odd_vocabulary_keeps_wide_loads(gate):
    """Catches a masked main loop: with V = 151,665 it would load two bytes at a time."""
    variant = gate.Variant(name="V = 151,665", vocabulary=151_665)
    assert gate.compile_variant(variant, 90).wide_loads >= 1
    # The gate can fail: rows at odd addresses have no wide load.
    assert gate.compile_variant(variant, 90, aligned=False).wide_loads == 0


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
def test_scaling_keeps_wide_loads(gate, target):
    """Catches a mask in its main loop."""
    found = gate.compile_scale("bf16", target)
    assert found.spills == 0
    assert found.wide_loads >= 1
