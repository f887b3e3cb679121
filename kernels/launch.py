"""How many warps and programs the loss kernel is launched with."""

from __future__ import annotations

import torch
import triton

_TWO_ROWS_BYTES = 96 << 10
# Elements of a large block that a thread holds.
PER_LANE = 16


def block_and_warps(vocabulary: int, element_bytes: int, *, wants_registers: bool) -> tuple[int, int]:
    """Return the elements of a block and the warps of a program.

    Pass 2 finds a row in the L2 cache when the rows in flight fit half of it: with 16 warps two programs fit a
    multiprocessor, so rows of more than 96 KiB (25 MB on 132 of them) get 32, one program each, which leaves a thread
    64 registers. `wants_registers` is for specialisations that need more, and for AMD's warps of 64 lanes.
    `fusechat profile kernels` shows what each takes.
    """
    row_bytes = vocabulary * element_bytes
    if row_bytes > _TWO_ROWS_BYTES and element_bytes == 2 and not wants_registers:
        return 16384, 32
    block = min(max(triton.next_power_of_2(vocabulary), PER_LANE), 16384 // element_bytes)
    return block, 16 if block == 8192 else 8 if block >= 1024 else 4


def range_programs(n_rows: int, device: torch.device) -> int:
    """Return how many programs share the rows with ranges, each with a scratch row."""
    if device.type != "cuda":
        return min(n_rows, 4)  # the interpreter: few enough that a program has several rows
    return min(n_rows, torch.cuda.get_device_properties(device).multi_processor_count)
