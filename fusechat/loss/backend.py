"""Which code computes the rows of the fusion loss: the compiled engine on the CPU, Triton on a GPU, torch elsewhere."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fusechat.errors import ConfigError, NativeMissingError
from fusechat.kernels import reference
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import Rows

try:
    from fusechat import _native
except ImportError:
    _native = None  # type: ignore[assignment]

# Elements of a chunk in torch's own form: its few fp32 copies of a chunk stay in the last-level cache of a
# CPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
NATIVE_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def backend_for(device: torch.device) -> str:
    """Return `native`, `triton` or `torch`, the best there is for the device.

    FUSECHAT_LOSS forces one, and raises ConfigError where it cannot run; FUSECHAT_NATIVE=require refuses to do without
    the compiled engine.
    """
    forced = os.environ.get("FUSECHAT_LOSS", "")
    if forced not in ("", "native", "triton", "torch"):
        raise ConfigError(f"FUSECHAT_LOSS is {forced!r}: use native, triton or torch")
    if forced == "torch":
        return forced
    if forced == "triton":
        if find_spec("triton") is None:
            raise ConfigError("FUSECHAT_LOSS is triton, which is not installed: pip install triton, or unset it")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "0":
            raise ConfigError("FUSECHAT_LOSS is triton, which runs on a GPU, but the tensors are on the CPU: unset it")
        return forced
    if forced == "native" and device.type != "cpu":
        raise ConfigError(f"FUSECHAT_LOSS is native, which runs on the CPU, but the tensors are on {device}: unset it")
    if device.type == "cuda":
        return "triton" if find_spec("triton") is not None else "torch"
    if device.type != "cpu":
        return "torch"
    if _native is not None:
        return "native"
    if forced == "native" or os.environ.get("FUSECHAT_NATIVE") == "require":
        raise NativeMissingError("the compiled engine is missing: install fusechat with a C++ compiler at hand")
    return "torch"


def forward_rows(logits: Tensor, rows: Rows, options: LossOptions, grad: Tensor | None) -> tuple[Tensor, ...]:
    """Compute loss, hard, soft, lse and correct of each row, and write row_scale · ∂loss/∂logits to `grad` if given.

    Raises ConfigError when FUSECHAT_LOSS forces what cannot take these logits, and when, on the CPU, a label or an id
    lies outside the vocabulary. On a GPU, where asking would wait for the device, Triton makes such a row's loss NaN,
    and torch's own form stops at a device-side assertion.
    """
    backend = backend_for(logits.device)
    apart = len(logits) < 2 or logits.stride(0) >= logits.shape[1]
    if not (logits.dtype in NATIVE_FORMATS and logits.stride(1) == 1 and apart):
        if os.environ.get("FUSECHAT_LOSS") == backend != "torch":
            raise ConfigError(
                f"FUSECHAT_LOSS is {backend}, which takes float32, bfloat16 or float16 contiguous along rows that do "
                f"not overlap; these are {logits.dtype} with strides {logits.stride()}: convert them, or unset it"
            )
        backend = "torch"
    if backend == "native":
        return _native_rows(logits, rows, options, grad)
    if backend == "triton":
        from fusechat.kernels.sparse_soft_ce import sparse_soft_ce_rows

        values: tuple[Tensor, ...] = sparse_soft_ce_rows(logits, *rows, **options.scalars(), grad=grad)
        return values
    return _torch_rows(logits, rows, options, grad)


def _plain(tensor: Tensor) -> Any:
    # NumPy has no bfloat16: two-byte floats cross as their bits.
    tensor = tensor.detach()
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)).numpy()


def native_topk(logits: Tensor, k: int, labels: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the compiled engine for `fusechat.topk.topk_rows`."""
    try:
        ids, logprobs, lse, label_logprob = _native.topk_logprob(
            logits=_plain(logits),
            format=NATIVE_FORMATS[logits.dtype],
            labels=labels.contiguous().numpy(),
            k=k,
            softcap=softcap,
            threads=torch.get_num_threads(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(lse), torch.from_numpy(label_logprob)


def _native_rows(logits: Tensor, rows: Rows, options: LossOptions, grad: Tensor | None) -> tuple[Tensor, ...]:
    columns = {name: column.contiguous().numpy() for name, column in rows._asdict().items() if column is not None}
    ranges = [columns.pop(name) for name in ("order", "low", "high")] if rows.order is not None else None
    try:
        values = _native.sparse_soft_ce(
            logits=_plain(logits),
            gradient=None if grad is None else _plain(grad),
            format=NATIVE_FORMATS[logits.dtype],
            **columns,
            ranges=None if ranges is None else tuple(ranges),
            **options.scalars(),
            threads=torch.get_num_threads(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return tuple(torch.from_numpy(value) for value in values)


def _torch_rows(logits: Tensor, rows: Rows, options: LossOptions, grad: Tensor | None) -> tuple[Tensor, ...]:
    n_rows, vocabulary = logits.shape
    if logits.device.type == "cpu":
        check_indices(rows, vocabulary)
    step = max(1, _CHUNK_ELEMENTS.get(logits.device.type, 1 << 20) // max(vocabulary, 1))
    chunks = [
        reference.sparse_soft_ce_chunk(
            logits[start : start + step],
            *rows.take(slice(start, start + step)),
            **options.scalars(),
            grad=None if grad is None else grad[start : start + step],
        )
        for start in range(0, n_rows, step)
    ]
    if not chunks:
        empty = logits.new_zeros(0, dtype=torch.float32)
        return empty, empty, empty, empty, empty.bool()
    return tuple(torch.cat(column) for column in zip(*chunks))


def check_indices(rows: Rows, vocabulary: int) -> None:
    """Raise ConfigError naming the first label, id or range outside the vocabulary; this reads the rows on the host."""
    outside = rows.labels >= vocabulary
    _refuse("label", rows.labels, outside | ((rows.labels < 0) & (rows.labels != reference.IGNORE_LABEL)), vocabulary)
    _refuse("id", rows.ids, rows.ids >= vocabulary, vocabulary)
    if rows.low is not None and rows.high is not None:
        _refuse("range start", rows.low, rows.low < 0, vocabulary)
        _refuse("range end", rows.high, rows.high > vocabulary, vocabulary)


def _refuse(name: str, column: Tensor, wrong: Tensor, vocabulary: int) -> None:
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ConfigError(f"{name} {int(column[at])} of row {at[0]} lies outside the vocabulary of {vocabulary}")
