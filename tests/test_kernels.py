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
        per_thread = block // (32 * warps)
        assert found.loop_barriers == 0 or variant.ranges, f"{variant.name} waits for other warps in a pass"
        if not (variant.extras or variant.ranges):  # with ranges a loop over rows is around the passes
            # A pass: conversion, maximum, difference, product, exponential, sum, and a little for the loop.
            assert 5 * per_thread < found.loop_instructions <= 10 * per_thread
            # One exponential an element and pass; a few more for the K cells and the running maximum.
            assert found.exponentials <= 4 * per_thread + 8 * max(1, variant.n_entries // 16) + 40


@pytest.mark.parametrize("index", [0, 1, 2])
def test_hopper_code_neither_spills_nor_narrows_its_loads(gate, index):
    """Catches a change that costs registers or breaks vectorisation, which no result shows."""
    check(gate, gate.VARIANTS[index], 90)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
def test_every_variant_compiles_within_its_means(gate, target):
    """Catches the same on the other architectures and for every specialisation."""
    import triton

    old = triton.__version__.startswith("3.6.")
    for variant in gate.VARIANTS:
        spills = variant.n_entries == 128 or variant.ranges or (variant.extras and old)
        if target == gate.AMD and spills:
            continue  # the table in docs/kernels.md says so
        check(gate, variant, target)


def test_an_odd_vocabulary_keeps_wide_loads(gate):
    """Catches a masked main loop: with V = 151,665 it would load two bytes at a time."""
    variant = gate.Variant(name="V = 151,665", vocabulary=151_665)
    assert gate.compile_variant(variant, 90).wide_loads >= 1
    # The gate can fail: rows at odd addresses have no wide load.
    assert gate.compile_variant(variant, 90, aligned=False).wide_loads == 0


def test_numbers_that_change_from_step_to_step_have_no_code_of_their_own():
    """Catches a compilation, of seconds, in the middle of training: for a chunk of 1 row, or of a multiple of 16."""
    from fusechat.kernels import scale, sce, sparse_soft_ce

    changing = {
        sparse_soft_ce._sparse_soft_ce: {"N", "K"}, scale._scale: {"n_rows"}, sce._tally: {"low", "high", "shift"},
        sce._energies: {"begin", "threshold", "tie_stop"}, sce._combine: {"begin", "threshold", "tie_stop"},
    }  # fmt: skip
    for kernel, names in changing.items():
        assert names == {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        wide = {parameter.name for parameter in kernel.params if parameter.annotation_type == "i64"}
        assert wide >= names & {"low", "high", "begin", "threshold", "tie_stop"}


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
def test_scaling_keeps_wide_loads(gate, target):
    """Catches a mask in its main loop."""
    found = gate.compile_scale("bf16", target)
    assert found.spills == 0
    assert found.wide_loads >= 1
