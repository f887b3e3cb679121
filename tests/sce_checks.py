"""SCE's Triton kernels against the engine, run by test_merge_gpu.py: under the interpreter, and on a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_device import DEVICE
from merge_tensor import assert_close, decode, random_model, run, sce_options

from fusechat import gpu_merge
from fusechat.kernels import sce
from fusechat.merge import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run_gpu(tmp: Path, *, out_dtype: str = "F32", n: int, sources: list[Any], **options: Any) -> Any:
    """Merge with the kernels."""
    out = os.open(tmp / "gpu", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        report = gpu_merge.merge_tensor(
            sources, n, out_dtype=out_dtype, out_fd=out, out_offset=4, device=DEVICE,
            **{"allow_nonfinite": False} | options,
        )  # fmt: skip
    finally:
        os.close(out)
    return decode((tmp / "gpu").read_bytes()[4:], out_dtype), report


def opened(tmp: Path, n: int, dtypes: list[str]) -> list[Any]:
    """The files `run` has written, as sources."""
    return [(os.open(tmp / f"input{i}", os.O_RDONLY), 6, dtype, n, None) for i, dtype in enumerate(dtypes)]


@pytest.mark.parametrize("variant", ["paper", "fuseai", "mergekit"])
@pytest.mark.parametrize("select_topk", [0.1, 1.0])
@pytest.mark.parametrize("out_dtype", ["BF16", "F16"])
def test_kernels_give_the_definition_and_the_engines_elements(
    tmp_path: Path, variant: Any, select_topk: float, out_dtype: str
) -> None:
    """Catches a threshold, tie, sign or weight that is not the definition's; one block, and several."""
    n, n_targets = 3003, 3
    base, targets = random_model(3, n, n_targets)
    options = sce_options(select_topk, variant)
    cpu, report = run(tmp_path, base, targets, dtypes="BF16", out_dtype=out_dtype, **options)
    sources = opened(tmp_path, n, ["BF16"] * (n_targets + 1))
    expected = reference.sce(base, targets, select_topk=select_topk, variant=variant)
    for block_bytes in (1 << 20, 16 * sce.BLOCK):
        found, again = run_gpu(tmp_path, n=n, sources=sources, out_dtype=out_dtype, block_bytes=block_bytes, **options)
        assert_close(found, expected, out_dtype)
        assert (found != cpu).sum() <= 1
        for key in ("n_touched", "n_conflicts"):
            assert again[key] == report[key]
        for key in ("weights", "energy", "kept_energy", "update_energy"):
            np.testing.assert_allclose(again[key], report[key], rtol=1e-12)
        mine, theirs = again["selections"][0], report["selections"][0]
        assert {k: mine[k] for k in ("k", "n_nonzero")} == {k: theirs[k] for k in ("k", "n_nonzero")}
        np.testing.assert_allclose(mine["energy"], theirs["energy"], rtol=1e-12)


GRID = st.one_of(st.integers(-6, 6).map(lambda i: i / 8), st.just(-0.0))


@given(
    n_targets=st.integers(1, 3),
    rows=st.lists(st.lists(GRID, min_size=4, max_size=4), min_size=1, max_size=30),
    scale=st.sampled_from([1.0, 2.0**-146, 2.0**100]),
    select_topk=st.sampled_from([0.05, 0.3, 0.7, 1.0]),
    variant=st.sampled_from(["paper", "fuseai", "mergekit"]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_hard_values(
    tmp_path: Path, n_targets: int, rows: list[list[float]], scale: float, select_topk: float, variant: Any
) -> None:
    """Catches ties to the wrong index, all-agree elements that count, zero sums, subnormals, ±0."""
    values = (np.array(rows).reshape(-1, 4).T * scale).astype(np.float32)
    base, targets = values[0].copy(), values[1 : n_targets + 1].copy()
    options = sce_options(select_topk, variant)
    cpu, report = run(tmp_path, base, targets, **options)
    sources = opened(tmp_path, base.size, ["F32"] * (n_targets + 1))
    found, again = run_gpu(tmp_path, n=base.size, sources=sources, **options)
    for source in sources:
        os.close(source[0])
    np.testing.assert_allclose(found, cpu, rtol=3e-7, atol=1e-44)
    assert again["n_touched"] == report["n_touched"]
    assert again["n_conflicts"] == report["n_conflicts"]


def test_a_tie_over_blocks_is_cut_at_the_lowest_index(tmp_path: Path) -> None:
    """Catches a cut that counts ties within one block only."""
    n = 3 * sce.BLOCK + 17
    base, targets = np.zeros(n, np.float32), np.array([[1.0], [2.0]], np.float32) * np.ones(n, np.float32)
    options = sce_options(0.7, "paper")
    cpu, _ = run(tmp_path, base, targets, **options)
    found, report = run_gpu(
        tmp_path, n=n, sources=opened(tmp_path, n, ["F32"] * 3), block_bytes=12 * sce.BLOCK, **options
    )
    assert report["selections"][0]["tie_stop"] == int(n * 0.7)
    np.testing.assert_array_equal(found, cpu)


def test_nonfinite_and_missing_rows(tmp_path: Path) -> None:
    """Catches a NaN that spreads, the wrong model blamed, and rows a target lacks that are read from elsewhere."""
    n = 2 * sce.BLOCK
    base, targets = random_model(1, n, 3)
    targets[1, 1500] = np.nan
    targets[2, 7] = np.inf
    options = sce_options(0.5, "paper")
    cpu, report = run(tmp_path, base, targets, allow_nonfinite=True, **options)
    sources = opened(tmp_path, n, ["F32"] * 4)
    _, refused = run_gpu(tmp_path, n=n, sources=sources, block_bytes=16 * sce.BLOCK, **options)
    assert refused["nonfinite"] == report["nonfinite"] == [(0, -1), (0, -1), (1, 1500), (1, 7)]
    found, _ = run_gpu(tmp_path, n=n, sources=sources, allow_nonfinite=True, **options)
    np.testing.assert_allclose(found, cpu, rtol=3e-7)
    short = [*sources[:3], (*sources[3][:3], 1000, None)]
    targets[2, 1000:] = base[1000:]
    cpu, _ = run(tmp_path, base, targets, allow_nonfinite=True, **options)
    found, _ = run_gpu(tmp_path, n=n, sources=short, allow_nonfinite=True, **options)
    np.testing.assert_allclose(found, cpu, rtol=3e-7)
