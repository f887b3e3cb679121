"""The compiled engine (csrc/). Arrays must be C-contiguous and of exactly the dtypes named in each room's module."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# csrc/align, used through fusechat/align/rows.py
def match_rows(
    pivot: tuple[npt.NDArray[Any], ...],
    source: tuple[npt.NDArray[Any], ...],
    partner: npt.NDArray[np.int64],
    threads: int,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]: ...
def remap_rows(
    matched: tuple[npt.NDArray[Any], ...],
    ids: npt.NDArray[Any],
    logprobs: npt.NDArray[np.uint16],
    gold_logprob: npt.NDArray[np.float32],
    gold: npt.NDArray[np.int32],
    source_bytes: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    source_ends_turn: npt.NDArray[np.uint8],
    pivot_bytes: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    map_target: npt.NDArray[np.int32],
    map_weight: npt.NDArray[np.float32],
    map_quality: npt.NDArray[np.uint8],
    probability: npt.NDArray[np.float32],
    choices: tuple[int, int, int],
    id_like: npt.NDArray[Any],
    threads: int,
) -> tuple[
    npt.NDArray[Any],
    npt.NDArray[np.uint16],
    npt.NDArray[np.float32],
    npt.NDArray[np.uint64],
    npt.NDArray[np.uint64],
]: ...

# csrc/merge, used through fusechat/merge/tensor.py
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
def tensor_checksum(fd: int, offset: int, n: int, item_bytes: int) -> int: ...
def xxh64(data: bytes) -> int: ...
def measure_tensor(sources: Sequence[_Source], n: int, *, threads: int = ...) -> dict[str, Any]: ...

# csrc/loss, used through fusechat/loss/backend.py
def sparse_soft_ce(
    *,
    logits: npt.NDArray[Any],
    gradient: npt.NDArray[Any] | None,
    format: str,
    labels: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    logprobs: npt.NDArray[np.float32],
    hard_weight: npt.NDArray[np.float32],
    row_scale: npt.NDArray[np.float32],
    partition: npt.NDArray[np.bool_],
    ranges: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]] | None,
    divergence: str,
    missing: str,
    temperature: float,
    student_temperature: float,
    beta: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    threads: int,
) -> tuple[npt.NDArray[Any], ...]: ...

# fusechat/topk.py
def topk_logprob(
    *,
    logits: npt.NDArray[Any],
    format: str,
    labels: npt.NDArray[np.int64] | None,
    k: int,
    softcap: float,
    threads: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...

# fusechat/align/timewarp.py and vocabulary.py
def dtw(
    source_tokens: list[str], pivot_tokens: list[str], source_mark: str, pivot_mark: str
) -> tuple[int, npt.NDArray[np.int32]]: ...
def nearest(
    patterns: list[str], texts: list[str], threads: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]: ...
def edit_distances(a: list[str], b: list[str]) -> npt.NDArray[np.int32]: ...
