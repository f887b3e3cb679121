"""The compiled engine (csrc/)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# (fd or −1 for zeros, byte offset, F32 | F16 | BF16, items there, (A [rank, columns], B [rows, rank], scale) or None)
_LowRank = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], float]
_Source = tuple[int, int, str, int, _LowRank | None]

def merge_tensor(
    sources: Sequence[_Source],
    n: int,
    *,
    mask: str = ...,
    elect: str = ...,
    divide: str = ...,
    weights: Sequence[float],
    scale: float = ...,
    mask_weights_only: bool = ...,
    per_parameter: bool = ...,
    energy_weights: bool = ...,
    uniform_below: float = ...,
    quota: Sequence[int] = ...,
    quota_share: tuple[int, int, bool] | None = ...,
    keep_share: Sequence[float] = ...,
    random_key: Sequence[int] = ...,
    allow_nonfinite: bool = ...,
    out_dtype: str,
    out_fd: int,
    out_offset: int,
    threads: int = ...,
) -> dict[str, Any]: ...
def measure_tensor(sources: Sequence[_Source], n: int, *, threads: int = ...) -> dict[str, Any]: ...
