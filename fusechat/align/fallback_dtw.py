"""Edit distance and warping without the compiled extension: csrc/align/dtw.cpp and edit_distance.cpp in numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_DIAGONAL, _LEFT, _UP = 0, 1, 2


def code_points(texts: list[str]) -> tuple[Array, Array]:
    """Return all texts' code points end to end, uint32, and where each begins, int64[n+1]."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32), offsets


def dtw(source_tokens: list[str], pivot_tokens: list[str], source_mark: str, pivot_mark: str) -> tuple[int, Array]:
    """Do what `fusechat._native.dtw` does."""
    if not source_tokens or not pivot_tokens:
        raise ValueError("both sides need a token")
    source_of, pivot_of = (
        {token: i for i, token in enumerate(dict.fromkeys(t))} for t in (source_tokens, pivot_tokens)
    )

    def removed(text: str, mark: str, by: str = "") -> str:
        return text.replace(mark, by) if mark else text

    table = _table(
        *code_points([removed(t, source_mark) for t in source_of]),
        *code_points([removed(t, source_mark, pivot_mark) for t in source_of]),
        *code_points([removed(t, pivot_mark) for t in pivot_of]),
        *code_points(list(pivot_of)),
    )
    source = np.array([source_of[t] for t in source_tokens], np.int64)
    pivot = np.array([pivot_of[t] for t in pivot_tokens], np.int64)
    cost, path = _warp(table, source, pivot)
    return int(cost), path[::-1].copy()


def nearest(patterns: list[str], texts: list[str], threads: int) -> tuple[Array, Array]:
    """Do what `fusechat._native.nearest` does, on one thread."""
    index, distance = _nearest(*code_points(patterns), *code_points(texts))
    return index, distance


def edit_distances(a: list[str], b: list[str]) -> Array:
    """Do what `fusechat._native.edit_distances` does."""
    if len(a) != len(b):
        raise ValueError("both lists must be equally long")
    a_data, a_offsets = code_points(a)
    b_data, b_offsets = code_points(b)
    out = np.empty(len(a), np.int32)
    _pairs(a_data, a_offsets, b_data, b_offsets, out)
    return out


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _distance(a: Array, b: Array, limit: int) -> int:
    """Levenshtein distance, or any number above `limit` as soon as it is known to exceed it."""
    row = np.arange(len(b) + 1)
    for i in range(len(a)):
        diagonal, row[0] = row[0], i + 1
        least = row[0]
        for j in range(len(b)):
            change = diagonal + (a[i] != b[j])
            diagonal = row[j + 1]
            row[j + 1] = min(change, min(diagonal, row[j]) + 1)
            least = min(least, row[j + 1])
        if least > limit:
            return int(least)
    return int(row[len(b)])


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _pairs(a: Array, a_at: Array, b: Array, b_at: Array, out: Array) -> None:
    for i in range(len(out)):
        out[i] = _distance(a[a_at[i] : a_at[i + 1]], b[b_at[i] : b_at[i + 1]], 2**31 - 1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _table(
    source: Array, source_at: Array, swapped: Array, swapped_at: Array,
    pivot: Array, pivot_at: Array, raw: Array, raw_at: Array,
) -> Array:  # fmt: skip
    n, m = len(source_at) - 1, len(pivot_at) - 1
    out = np.empty((n, m), np.int64)
    for i in range(n):
        for j in range(m):
            a, b = source[source_at[i] : source_at[i + 1]], pivot[pivot_at[j] : pivot_at[j + 1]]
            if len(a) == 0 or len(b) == 0:
                a, b = swapped[swapped_at[i] : swapped_at[i + 1]], raw[raw_at[j] : raw_at[j + 1]]
            out[i, j] = _distance(a, b, 2**31 - 1)
    return out


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _warp(table: Array, source: Array, pivot: Array) -> tuple[int, Array]:
    n, m = len(source), len(pivot)
    infinite = np.int64(1) << 60
    moves = np.empty((n, m), np.uint8)
    row = np.full(m, infinite, np.int64)
    for i in range(n):
        diagonal, left = np.int64(0) if i == 0 else infinite, infinite
        for j in range(m):
            up = row[j]
            side = min(left, up)
            moves[i, j] = (_UP if up < left else _LEFT) if side < diagonal else _DIAGONAL
            left = min(diagonal, side) + table[source[i], pivot[j]]
            row[j] = left
            diagonal = up
    path = np.empty((n + m, 2), np.int32)
    i, j, length = n - 1, m - 1, 0
    while True:
        path[length, 0], path[length, 1] = i, j
        length += 1
        if i == 0 and j == 0:
            return row[m - 1], path[:length]
        move = moves[i, j]
        i -= move != _LEFT
        j -= move != _UP


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _nearest(patterns: Array, pattern_at: Array, texts: Array, text_at: Array) -> tuple[Array, Array]:
    n, m = len(pattern_at) - 1, len(text_at) - 1
    index, distance = np.full(n, -1, np.int64), np.full(n, 2**31 - 1, np.int32)
    for i in range(n):
        pattern = patterns[pattern_at[i] : pattern_at[i + 1]]
        for j in range(m):
            length = text_at[j + 1] - text_at[j]
            if abs(length - len(pattern)) < distance[i]:
                found = _distance(pattern, texts[text_at[j] : text_at[j + 1]], distance[i])
                if found < distance[i]:
                    index[i], distance[i] = j, found
    return index, distance
