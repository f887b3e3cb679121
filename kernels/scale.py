"""A gradient times a factor that only the device knows: nobody waits for it, and a factor of one costs no pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 4
_PROGRAMS_PER_PROCESSOR = 8


@triton.jit(do_not_specialize=["n_rows"])
def _scale(G, FACTOR, stride, n_rows, n_columns, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1.0:
        columns = tl.arange(0, BLOCK)
        n_whole = n_columns // BLOCK
        last = n_whole * BLOCK + columns
        for row in range(tl.program_id(0).to(tl.int64), n_rows, tl.num_programs(0)):
            g_row = G + row * stride
            # No mask in the main loop: one would take its 128-bit accesses where n_columns is no multiple of 16.
            for block in range(0, n_whole):
                at = g_row + block * BLOCK + columns
                g = tl.load(at)
                tl.store(at, (g.to(tl.float32) * factor).to(g.dtype))
            if n_whole * BLOCK < n_columns:
                g = tl.load(g_row + last, mask=last < n_columns, other=0.0)
                tl.store(g_row + last, (g.to(tl.float32) * factor).to(g.dtype), mask=last < n_columns)


def scale_rows_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply gradient [N, V] in place by a scalar on its device. Rows may be apart, their elements not."""
    n_rows, n_columns = gradient.shape
    if gradient.stride(1) != 1:
        raise ValueError("rows of the gradient must be contiguous")
    if gradient.numel() == 0:
        return
    programs = 4  # the interpreter: few enough that a program has several rows
    if gradient.device.type == "cuda":
        processors = torch.cuda.get_device_properties(gradient.device).multi_processor_count
        programs = processors * _PROGRAMS_PER_PROCESSOR
    with torch.cuda.device_of(gradient):
        _scale[(min(n_rows, programs),)](
            gradient, factor, gradient.stride(0), n_rows, n_columns, BLOCK=BLOCK, num_warps=WARPS
        )
