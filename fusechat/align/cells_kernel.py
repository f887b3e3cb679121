"""The loop of fusechat.align.cells.cell_rows, in numba whether or not the compiled engine is there."""

from __future__ import annotations

from typing import Any

import numba
import numpy.typing as npt

Array = npt.NDArray[Any]

_SMALLEST = 2.0**-24


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def fill(
    gold: Array, chain: Array, source_rows: Array, map_of: Array, candidates: Array, probability: Array,
    source_gold: Array, source_gold_probability: Array, map_low: Array, map_high: Array, map_target: Array, out: Any,
) -> None:  # fmt: skip
    ids, mass, low, high = out
    for r in range(len(gold)):
        m = map_of[r]
        ids[r, 0], mass[r, 0] = gold[r], chain[r]
        n = 1
        for k in range(-1, candidates.shape[1]):
            # −1: the source's own next token, whose mass the pivot's next token has a share of already.
            token = source_gold[r] if k < 0 else candidates[r, k]
            p = source_gold_probability[r] - chain[r] if k < 0 else probability[r, k]
            if p < _SMALLEST or (k >= 0 and token == source_gold[r]):
                continue
            begin, end, single = map_low[m, token], map_high[m, token], -1
            if end <= begin:
                begin, end, single = 0, 0, map_target[m, token]
                if single < 0:
                    continue
            slot = n
            for i in range(n):
                if low[r, i] == begin and high[r, i] == end and (end > begin or ids[r, i] == single):
                    slot = i
                    break
            if slot == n:
                low[r, n], high[r, n], ids[r, n] = begin, end, max(single, 0)
                n += 1
            mass[r, slot] += p
