"""The compiled merge of one tensor against the plain definition, and against itself cut up differently."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_tensor import assert_close, decode, random_model, run, sce_options, to_bf16

from fusechat import _native
from fusechat.merge import reference

F32 = npt.NDArray[np.float32]
ONE_SEGMENT = 65536
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("variant", ["paper", "fuseai", "mergekit"])
@pytest.mark.parametrize("select_topk", [0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("n_targets", [2, 5])
@pytest.mark.parametrize("out_dtype", ["BF16", "F16", "F32"])
def test_sce_is_its_definition(
    tmp_path: Path, variant: Any, select_topk: float, n_targets: int, out_dtype: str
) -> None:
    """Catches any departure from eqs 5–9 or from the two released readings, on updates with thousands of exact ties."""
    base, targets = random_model(n_targets, 20_011, n_targets)
    expected = reference.sce(base, targets, select_topk=select_topk, variant=variant)
    found, report = run(
        tmp_path, base, targets, dtypes="BF16", out_dtype=out_dtype, **sce_options(select_topk, variant)
    )
    assert_close(found, expected, out_dtype)
    assert abs(sum(report["weights"]) - 1) < 1e-12


@pytest.mark.parametrize("variant", ["paper", "fuseai", "mergekit"])
def test_more_targets_than_registers_hold(tmp_path: Path, variant: Any) -> None:
    """Catches a fault in the loops for any number of targets, which two to five do not take."""
    base, targets = random_model(7, 3011, 7)
    expected = reference.sce(base, targets, select_topk=0.3, variant=variant)
    found, _ = run(tmp_path, base, targets, dtypes="BF16", out_dtype="BF16", **sce_options(0.3, variant))
    assert_close(found, expected, "BF16")


GRID = st.one_of(st.integers(-6, 6).map(lambda i: i / 8), st.just(-0.0))


@given(
    n_targets=st.integers(1, 5),
    rows=st.lists(st.lists(GRID, min_size=6, max_size=6), max_size=40),
    scale=st.sampled_from([1.0, 2.0**-146, 2.0**-130, 2.0**100]),
    select_topk=st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.7, 1.0]),
    variant=st.sampled_from(["paper", "fuseai", "mergekit"]),
)
@settings(max_examples=300, deadline=None)
def test_sce_on_hard_values(
    tmp_path_factory: pytest.TempPathFactory,
    n_targets: int,
    rows: list[list[float]],
    scale: float,
    select_topk: float,
    variant: Any,
) -> None:
    """Catches wrong ties, all-agree elements that count as variance, zero sums, subnormals, ±0, empty and odd sizes."""
    values = (np.array(rows).reshape(-1, 6).T * scale).astype(np.float32)
    base, targets = values[0].copy(), values[1 : n_targets + 1].copy()
    found, _ = run(tmp_path_factory.mktemp("hard"), base, targets, **sce_options(select_topk, variant))
    if len(rows) == 0:
        assert found.size == 0
        return
    expected = reference.sce(base, targets, select_topk=select_topk, variant=variant)
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=3e-7, atol=1e-44)


@pytest.mark.parametrize("kind", ["spread", "grid", "constant", "clustered"])
def test_threads_and_fallbacks_do_not_change_a_bit(tmp_path: Path, kind: str) -> None:
    """Catches order-dependent sums and wrong narrowing: big tensors whose thresholds are unique, tied a thousandfold,
    all one tie, or nowhere near where a sample says."""
    rng = np.random.default_rng(7)
    n, n_targets = 6 * ONE_SEGMENT + 1234, 3
    base = np.zeros(n, np.float32)
    moved = rng.normal(0, 1, (n_targets, n))
    if kind == "grid":
        moved = np.round(moved * 2) / 2
    elif kind == "constant":
        moved = np.array([1.0, 2.0, -1.0])[:, None] * np.ones(n)
    elif kind == "clustered":
        moved *= np.where(np.arange(n) // 64 % 7 == 3, 1000.0, 1.0)
    targets = moved.astype(np.float32)
    options = sce_options(0.1, "paper")
    one, report = run(tmp_path, base, targets, threads=1, **options)
    two, again = run(tmp_path, base, targets, threads=3, **options)
    assert one.tobytes() == two.tobytes()
    assert report == again
    keys = (
        n_targets * (moved.astype(np.float32).astype(np.float64) ** 2).sum(0)
        - moved.astype(np.float32).sum(0, dtype=np.float64) ** 2
    )
    order = np.lexsort((np.arange(n), -np.round(keys, 9)))
    (selection,) = report["selections"]
    assert selection["k"] == int(selection["n_nonzero"] / 10)
    chosen = order[: selection["k"]]
    assert not one[np.setdiff1d(np.arange(n), chosen)].any()
    np.testing.assert_allclose(selection["energy"], (targets[:, chosen].astype(np.float64) ** 2).sum(1), rtol=1e-12)


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
@pytest.mark.parametrize("dtypes", [["BF16"] * 6, ["BF16", "F32", "BF16", "F16", "BF16", "BF16"]])
@pytest.mark.parametrize("even", [True, False])
def test_carried_and_reread_segments_merge_alike(tmp_path: Path, variant: Any, dtypes: list[str], even: bool) -> None:
    """Catches a candidate that lost its base or a delta where another was not selected, and a difference between what
    waits in the output's place and what is read again: a bf16 output is carried to, a float32 output of a bf16 base is
    not. Unless all segments are even, one has more candidates than its place holds, and some keys overflow fp32 or
    vanish there."""
    rng = np.random.default_rng(9)
    n = 4 * ONE_SEGMENT + 777
    base, targets = random_model(9, n, 5)
    busy = slice(ONE_SEGMENT, ONE_SEGMENT + 20_000)
    if not even:
        targets[:, busy] = to_bf16((base[busy] + rng.normal(0, 0.1, (5, 20_000))).astype(np.float32))
        targets[:, 5000:9000] = base[5000:9000] = 0
        targets[3, 5000:9000] = 2.0**-24
        targets[1, [7, 3 * ONE_SEGMENT]] = to_bf16(np.array([3e20, -3e20], np.float32))
    options = sce_options(0.06, variant)
    carried, report = run(tmp_path, base, targets, dtypes=dtypes, out_dtype="BF16", **options)
    threaded, same = run(tmp_path, base, targets, dtypes=dtypes, out_dtype="BF16", threads=3, **options)
    assert carried.tobytes() == threaded.tobytes()
    assert report == same
    reread, other = run(tmp_path, base, targets, dtypes=dtypes, out_dtype="F32", **options)
    np.testing.assert_array_equal(carried, to_bf16(reread))
    for key in ("selections", "weights", "n_touched", "n_conflicts"):
        assert report[key] == other[key]
    for key in ("energy", "kept_energy", "update_energy"):
        np.testing.assert_allclose(report[key], other[key], rtol=1e-9)


def test_a_bracket_of_carried_ties(tmp_path: Path) -> None:
    """Catches ties cut at the wrong neighbour, and a further pass over what was carried that counts otherwise: a
    hundredth of the elements has the largest key; more than a list holds share the next, and few of them are taken."""
    n, group = 16 * ONE_SEGMENT + 100, np.arange(16 * ONE_SEGMENT + 100) // 16 % 200
    moved = np.where(group < 2, 0.5, np.where(group < 21, 0.25, 0.0)).astype(np.float32)
    base = np.ones(n, np.float32)
    targets = np.stack([base, base, base, base, base + moved])
    k = int((moved > 0).sum()) // 10
    ties = np.flatnonzero(moved == 0.25)[: k - int((moved == 0.5).sum())]
    expected = np.where(moved == 0.5, np.float32(1.5), base)
    expected[ties] = 1.25
    for threads in (1, 3):
        found, report = run(
            tmp_path, base, targets, dtypes="BF16", out_dtype="BF16", threads=threads, **sce_options(0.1, "paper")
        )
        np.testing.assert_array_equal(found, expected)
        (selection,) = report["selections"]
        assert (selection["k"], selection["n_nonzero"]) == (k, int((moved > 0).sum()))
        assert selection["tie_stop"] == ties[-1] + 1
        assert ties[-1] + 1 in np.flatnonzero(moved == 0.25)  # the first that is not taken is a neighbour


def test_candidates_that_are_taken_up_again_count_alone(tmp_path: Path) -> None:
    """Catches lanes behind a tile's candidates that still hold another tile's: a hundredth of the elements, anywhere,
    has the largest key; more than a list holds share the next, so that what was carried is passed over again."""
    n = 16 * ONE_SEGMENT + 100
    rng = np.random.default_rng(4)
    moved = rng.choice(np.array([0.5, 0.25, 0.0], np.float32), n, p=[0.01, 0.095, 0.895])
    base = np.ones(n, np.float32)
    targets = np.stack([base, base, base, base, base + moved])
    k, n_largest = int((moved > 0).sum()) // 10, int((moved == 0.5).sum())
    _, report = run(tmp_path, base, targets, dtypes="BF16", out_dtype="BF16", **sce_options(0.1, "paper"))
    (selection,) = report["selections"]
    assert selection["k"] == k > n_largest
    assert selection["energy"] == [0, 0, 0, 0, 0.25 * n_largest + 0.0625 * (k - n_largest)]
    assert report["n_touched"] == k


def test_checksums_are_xxh64(tmp_path: Path) -> None:
    """Catches a hash of our own making, by xxHash's published values, and chunks hashed out of place."""
    known = {b"": 0xEF46DB3751D8E999, b"xxhash": 0x32DD38952C4BC720}
    known[b"Nobody inspects the spammish repetition"] = 0xFBCEA83C8A378BF1
    for data, expected in known.items():
        assert _native.xxh64(data) == expected
    base, targets = random_model(3, 2 * ONE_SEGMENT + 5, 2)
    _, report = run(tmp_path, base, targets, threads=2, dtypes="BF16", out_dtype="BF16", **sce_options(0.1, "paper"))
    written = (tmp_path / "out").read_bytes()[4:]
    chunks = [_native.xxh64(written[i : i + 32768]) for i in range(0, len(written), 32768)]
    assert report["checksum"] == _native.xxh64(np.array(chunks, np.uint64).tobytes())
    with (tmp_path / "out").open("rb") as file:
        assert _native.tensor_checksum(file.fileno(), 4, base.size, 2) == report["checksum"]


def test_thresholds_of_several_targets_are_found_in_shared_passes(tmp_path: Path) -> None:
    """Catches a target that gets another's threshold, or is lost, when some need more passes than others: spread, tied
    a thousandfold, all one tie, nowhere near where a sample says."""
    rng = np.random.default_rng(5)
    n = 6 * ONE_SEGMENT + 1234
    moved = rng.normal(0, 1, (4, n))
    moved[1] = np.round(moved[1] * 2) / 2
    moved[2] = 3.0
    moved[3] *= np.where(np.arange(n) // 64 % 7 == 3, 1000.0, 1.0)
    targets = moved.astype(np.float32)
    quota = [n // 10, n // 3, n // 2, n // 5]
    for j in range(4):
        options: dict[str, Any] = {"mask": "each", "quota": quota, "weights": [float(i == j) for i in range(4)]}
        found, report = run(tmp_path, np.zeros(n, np.float32), targets, threads=1, **options)
        expected = np.where(reference.top_by_magnitude(targets[j].astype(np.float64), quota[j]), targets[j], 0)
        np.testing.assert_array_equal(found, expected)
        again, same = run(tmp_path, np.zeros(n, np.float32), targets, threads=3, **options)
        assert found.tobytes() == again.tobytes()
        assert report == same


def test_nonfinite_is_counted_and_named(tmp_path: Path) -> None:
    """Catches a NaN that spreads, or is blamed on the wrong model or element."""
    base, targets = random_model(1, 5000, 3)
    targets[1, 4321] = np.nan
    targets[1, 4800] = np.inf
    for options in (sce_options(0.1, "paper"), {}):
        _, report = run(tmp_path, base, targets, **options)
        assert report["nonfinite"] == [(0, -1), (0, -1), (2, 4321), (0, -1)]
    found, _ = run(tmp_path, base, targets, allow_nonfinite=True, **sce_options(1.0, "paper"))
    assert found[4321] == base[4321]
    assert np.isfinite(found).all()


def test_overflow_of_the_output_dtype_is_counted(tmp_path: Path) -> None:
    """Catches a silent infinity in a float16 output."""
    _, report = run(tmp_path, np.zeros(3, np.float32), np.array([[1.0, 65520.0, 7e4]], np.float32), out_dtype="F16")
    assert report["n_overflow"] == 2
    found, report = run(tmp_path, np.zeros(1, np.float32), np.array([[65519.0]], np.float32), out_dtype="F16")
    assert report["n_overflow"] == 0
    assert found[0] == 65504


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_pattern_survives(tmp_path: Path, dtype: str) -> None:
    """Catches errors in the conversions: all finite 16-bit patterns go in and come out unchanged."""
    patterns = np.arange(65536, dtype=np.uint16)
    values = decode(patterns.tobytes(), dtype)
    values = values[np.isfinite(values)]
    found, _ = run(tmp_path, None, values[None], dtypes=dtype, out_dtype=dtype)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_rounding_is_to_nearest_even(tmp_path: Path, dtype: str) -> None:
    """Catches truncation and wrong ties, subnormals included."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**31, 100_000, dtype=np.uint32) & np.uint32(0xFFFF_F000)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < (6e4 if dtype == "F16" else 3e38))]
    found, _ = run(tmp_path, None, values[None], out_dtype=dtype)
    expected = to_bf16(values) if dtype == "BF16" else values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


FEW_THREADS = """
import resource, sys
from pathlib import Path
import numpy as np
from fusechat import _native
logits = np.random.default_rng(0).normal(0, 1, (64, 500)).astype(np.float32)
def top(threads):
    return _native.topk_logprob(logits=logits, format="float32", labels=None, k=5, softcap=0.0, threads=threads)
one = top(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
for room_mib in (20, 2):  # room for a stack or two of 8 MiB, and for none
    limit = pages * resource.getpagesize() + (room_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, top(8))))
"""


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer reserves all addresses itself")
def test_where_the_system_gives_no_thread_one_does_the_work() -> None:
    """Catches a process that ends, without a word of Python's, because a thread could not be started."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_THREADS], env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


NO_MEMORY_FOR_A_THREAD = """
#include <cstdio>
#include <cstdlib>
#include <new>
#include "parallel.hpp"
int left = -1;  // allocations that succeed, once it is not negative
void *operator new(std::size_t size) {
    if (left == 0) throw std::bad_alloc();
    if (left > 0) --left;
    if (void *place = std::malloc(size)) return place;
    throw std::bad_alloc();
}
void operator delete(void *place) noexcept { std::free(place); }
void operator delete(void *place, std::size_t) noexcept { std::free(place); }
int main() {
    std::atomic<long> sum{0};
    left = 2;  // the list of threads, and one of them
    fusechat::parallel_for(100, 1, 4, [&](std::int64_t begin, std::int64_t end) {
        for (; begin < end; ++begin) sum += begin;
    });
    std::printf("%ld", sum.load());
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_where_no_memory_is_left_for_a_thread_the_others_do_the_work(tmp_path: Path) -> None:
    """Catches a process that is ended because threads were still running when the next could not be made."""
    (tmp_path / "main.cpp").write_text(NO_MEMORY_FOR_A_THREAD)
    sources, libraries = ["main.cpp", ROOT / "csrc/parallel.cpp"], ["-pthread", "-ldl"]
    build = ["c++", "-std=c++20", f"-I{ROOT / 'csrc'}", *sources, "-o", "main", *libraries]
    subprocess.run(build, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4950"), done.stderr[-2000:]


def test_what_comes_from_python_is_checked(tmp_path: Path) -> None:
    """Catches reads and writes outside the data."""
    good: dict[str, Any] = {"weights": [1.0], "out_dtype": "F32", "out_fd": 1, "out_offset": 0}
    zeros = (-1, 0, "F32", 4, None)
    for sources, n, options in [
        ([zeros], 4, {}),
        ([zeros, (-1, -1, "F32", 4, None)], 4, {}),
        ([zeros, (-1, 0, "F32", 5, None)], 4, {}),
        ([(-1, 0, "F32", 3, None), zeros], 4, {}),
        ([zeros, (-1, 0, "F8", 4, None)], 4, {}),
        ([zeros, zeros], -1, {}),
        ([zeros, zeros], 2**60, {}),
        ([zeros, zeros], 4, {"weights": [1.0, 2.0]}),
        ([zeros, zeros], 4, {"mask": "each", "quota": [5]}),
        ([zeros, zeros], 4, {"mask": "shared"}),
        ([zeros, zeros], 4, {"mask": "shared", "quota_share": (2, 1, False)}),
        ([zeros, zeros], 4, {"mask": "random", "keep_share": [0.0], "random_key": [1]}),
        ([zeros, zeros], 4, {"out_fd": -1}),
        ([zeros, (-1, 0, "F32", 4, (np.ones((1, 3), np.float32), np.ones((1, 1), np.float32), 1.0))], 4, {}),
    ]:
        with pytest.raises(ValueError):
            _native.merge_tensor(sources, n, **(good | options))
    path = tmp_path / "short"
    path.write_bytes(b"1234")
    with path.open("rb") as file, pytest.raises(RuntimeError, match="shorter"):
        _native.merge_tensor([zeros, (file.fileno(), 0, "F32", 4, None)], 4, **good)
