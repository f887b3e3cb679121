"""One tensor merged by the compiled engine, as tests ask for it, and the encodings they compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from merge_family import F32

from fusechat import _native


def to_bf16(values: F32) -> F32:
    """Round to the nearest bf16, ties to even; finite values only."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) << 16).astype(np.uint32)).view(np.float32)


def encode(values: F32, dtype: str) -> bytes:
    """Return little-endian bytes of values that the dtype represents exactly."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def decode(data: bytes, dtype: str) -> F32:
    """Undo `encode`."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def run(
    tmp: Path,
    base: F32 | None,
    targets: F32,
    *,
    dtypes: str | list[str] = "F32",
    out_dtype: str = "F32",
    **options: Any,
) -> tuple[F32, dict[str, Any]]:
    """Write the inputs to files, merge, and read the result back."""
    n = targets.shape[1]
    names = [dtypes] * (len(targets) + 1) if isinstance(dtypes, str) else dtypes
    sources: list[Any] = []
    handles = []
    for i, values in enumerate([base, *targets]):
        if values is None:
            sources.append((-1, 0, "F32", n, None))
            continue
        path = tmp / f"input{i}"
        path.write_bytes(b"header" + encode(values, names[i]))
        handles.append(os.open(path, os.O_RDONLY))
        sources.append((handles[-1], 6, names[i], n, None))
    handles.append(os.open(tmp / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    options.setdefault("weights", [1.0] * len(targets))
    try:
        report = _native.merge_tensor(sources, n, out_dtype=out_dtype, out_fd=handles[-1], out_offset=4, **options)
    finally:
        for handle in handles:
            os.close(handle)
    return decode((tmp / "out").read_bytes()[4:], out_dtype), report


def sce_options(select_topk: float, variant: str) -> dict[str, Any]:
    """The engine's words for an SCE merge."""
    millionths = round(select_topk * 10**6)
    selecting = {"mask": "shared", "quota_share": (millionths, 10**6, variant != "paper")} if select_topk < 1 else {}
    return {
        **selecting,
        "elect": "plain",
        "energy_weights": True,
        "mask_weights_only": variant == "fuseai",
        "uniform_below": 1e-6 if variant == "mergekit" else 0.0,
        "divide": {"paper": "none", "fuseai": "surviving", "mergekit": "clamped"}[variant],
    }


def random_model(seed: int, n: int, n_targets: int, *, scale: float = 1e-3) -> tuple[F32, F32]:
    """A bf16 base and targets that moved a little, a quarter of the elements not at all."""
    rng = np.random.default_rng(seed)
    base = to_bf16(rng.normal(0, 0.02, n).astype(np.float32))
    moved = rng.normal(0, scale, (n_targets, n)) * (rng.random((n_targets, n)) > 0.25)
    return base, np.stack([to_bf16((base + row).astype(np.float32)) for row in moved])


def assert_close(found: F32, expected: npt.NDArray[np.float64], out_dtype: str) -> None:
    """Allow one element in ten thousand to differ, by one unit in the last place."""
    rounded = expected.astype(np.float32)
    rounded = (
        to_bf16(rounded) if out_dtype == "BF16" else rounded.astype({"F16": "f2", "F32": "f4"}[out_dtype]).astype("f4")
    )
    step = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}[out_dtype]
    least = {"BF16": 1e-38, "F16": 2.0**-24, "F32": 2.0**-149}[out_dtype]
    differ = found != rounded
    assert differ.mean() <= 1e-4 or differ.sum() <= 1, f"{differ.sum()} of {differ.size} differ"
    np.testing.assert_allclose(found, rounded, rtol=step * 1.01, atol=least)
