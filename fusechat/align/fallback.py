"""The alignment engine without the compiled extension: csrc/align/match.cpp and remap.cpp in numba, call for call."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from fusechat.align.fallback_dtw import dtw, edit_distances, nearest

__all__ = ["dtw", "edit_distances", "match_rows", "nearest", "remap_rows"]

Array = npt.NDArray[Any]

_SAME, _COARSER, _FINER, _NONE = 0, 1, 2, 3
_WIDE, _ZERO, _END = 0, 1, 2
_LOST, _EXACT = 0, 1
_MASS_UNIT = float(1 << 30)


def match_rows(
    pivot: tuple[Array, ...], source: tuple[Array, ...], partner: Array, threads: int
) -> tuple[Array, Array, Array, Array]:
    """Do what `fusechat._native.match_rows` does, on one thread."""
    n_rows = int(pivot[1][-1])
    kind = np.full(n_rows, _NONE, np.uint8)
    source_row = np.full(n_rows, -1, np.int64)
    chain, rest_bytes = np.zeros(n_rows, np.int32), np.zeros(n_rows, np.int32)
    p_rows, s_rows = _rows(*pivot), _rows(*source)
    _match(p_rows, pivot[1], s_rows, source[1], partner, kind, source_row, chain, rest_bytes)
    return kind, source_row, chain, rest_bytes


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _rows(offsets: Array, row_offsets: Array, loss_mask: Array, turn: Array, byte_end: Array, control: Array) -> Array:
    """Return (turn, prefix end, next end, class) of every row, int32[R,4]."""
    rows = np.empty((row_offsets[-1], 4), np.int32)
    for i in range(len(offsets) - 1):
        r = row_offsets[i]
        for t in range(offsets[i], offsets[i + 1] - 1):
            if not loss_mask[t + 1]:
                continue
            if r == row_offsets[i + 1]:
                raise ValueError("a dialogue has more rows by its loss mask than by its offsets")
            prefix = byte_end[t] if turn[t] == turn[t + 1] else np.int32(0)
            following = byte_end[t + 1]
            rows[r, 0], rows[r, 1], rows[r, 2] = turn[t + 1], prefix, following
            rows[r, 3] = _WIDE if following > prefix else (_END if control[t + 1] else _ZERO)
            r += 1
        if r != row_offsets[i + 1]:
            raise ValueError("a dialogue has fewer rows by its loss mask than by its offsets")
    return rows


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _match(
    pivot: Array,
    pivot_offsets: Array,
    source: Array,
    source_offsets: Array,
    partner: Array,
    kind: Array,
    source_row: Array,
    chain: Array,
    rest_bytes: Array,
) -> None:
    cursor = np.zeros(3, np.int64)
    for i in range(len(partner)):
        if partner[i] < 0:
            continue
        s, stop = source_offsets[partner[i]], source_offsets[partner[i] + 1]
        p, p_stop = pivot_offsets[i], pivot_offsets[i + 1]
        while p < p_stop:
            turn, prefix = pivot[p, 0], pivot[p, 1]
            while s < stop and (source[s, 0] < turn or (source[s, 0] == turn and source[s, 1] < prefix)):
                s += 1
            s_end = s
            while s_end < stop and source[s_end, 0] == turn and source[s_end, 1] == prefix:
                s_end += 1
            cursor[:] = s
            while p < p_stop and pivot[p, 0] == turn and pivot[p, 1] == prefix:
                c, cls = cursor[pivot[p, 3]], pivot[p, 3]
                while c < s_end and source[c, 3] != cls:
                    c += 1
                if c < s_end:
                    kind[p], chain[p], rest_bytes[p] = _pair(pivot[p], source, c, stop)
                    source_row[p] = c if kind[p] != _NONE else -1
                    c += 1
                cursor[cls] = c
                p += 1
            s = s_end


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _pair(row: Array, source: Array, s: int, stop: int) -> tuple[int, int, int]:
    if row[3] != _WIDE or source[s, 2] == row[2]:
        return _SAME, 1, 0
    if source[s, 2] > row[2]:
        return _COARSER, 1, 0
    last = s
    while source[last, 2] < row[2]:
        boundary = source[last, 2]
        last += 1
        if last == stop or source[last, 0] != row[0] or source[last, 3] != _WIDE or source[last, 1] != boundary:
            return _NONE, 0, 0
    rest = row[2] - source[last, 1] if source[last, 2] > row[2] else 0
    return _FINER, last - s + 1, rest


def remap_rows(
    matched: tuple[Array, ...],
    ids: Array,
    logprobs: Array,
    gold_logprob: Array,
    gold: Array,
    source_bytes: tuple[Array, Array],
    source_ends_turn: Array,
    pivot_bytes: tuple[Array, Array],
    map_target: Array,
    map_weight: Array,
    map_quality: Array,
    probability: Array,
    choices: tuple[int, int, int],
    id_like: Array,
    threads: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """Do what `fusechat._native.remap_rows` does, on one thread."""
    n_rows, k = len(matched[0]), ids.shape[1]
    pivot_vocab, source_vocab = len(pivot_bytes[1]) - 1, map_target.shape[1]
    _want_inside("pivot token", matched[4], pivot_vocab)
    _want_inside("map", matched[6], len(map_target))
    present = logprobs != np.float16(-np.inf).view(np.uint16)
    _want_inside("source token", ids[present], source_vocab)
    values = logprobs.view(np.float16)
    if np.isnan(values).any() or (values > 2**-10).any():
        raise ValueError("a log-probability is NaN or positive")
    if map_target.size and map_target.max() >= pivot_vocab:
        raise ValueError(f"map entry {map_target.max()} is outside 0..{pivot_vocab - 1}")
    used = matched[0] != _NONE
    _want_inside("source row", matched[1][used], len(ids))
    _want_inside("source row", (matched[1] + matched[2] - 1)[used], len(ids))
    out_ids = np.zeros((n_rows, k), id_like.dtype)
    out = np.full((n_rows, k), -np.inf, np.float32)
    out_gold = np.full(n_rows, np.nan, np.float32)
    mass, lost = np.zeros((4, 3), np.uint64), np.zeros(source_vocab, np.uint64)
    magnitude = np.where(values > 0, np.uint16(0), logprobs & np.uint16(0x7FFF))
    _remap(
        matched, ids, magnitude, gold_logprob, gold, source_bytes, source_ends_turn, pivot_bytes,
        map_target, map_weight, map_quality, probability, choices, out_ids, out, out_gold, mass, lost,
    )  # fmt: skip
    return out_ids, out.astype(np.float16).view(np.uint16), out_gold, mass, lost


def _want_inside(what: str, values: Array, bound: int) -> None:
    wrong = (values < 0) | (values >= bound)
    if wrong.any():
        raise ValueError(f"{what} {values[wrong][0]} is outside 0..{bound - 1}")


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _remap(
    matched: Any, ids: Array, magnitude: Array, gold_logprob: Array, gold: Array, source_bytes: Any,
    source_ends_turn: Array, pivot_bytes: Any, map_target: Array, map_weight: Array, map_quality: Array,
    probability: Array, choices: Any, out_ids: Array, out: Array, out_gold: Array, mass: Array, lost: Array,
) -> None:  # fmt: skip
    kind, source_row, chain, rest_bytes, pivot_gold, ends_turn, map_index = matched
    finer, unaligned, sums = choices[0], choices[1], choices[2] == 0
    k, width = ids.shape[1], map_target.shape[2]
    stamp = np.full(len(pivot_bytes[1]) - 1, -1, np.int64)
    slot_of = np.zeros(len(stamp), np.int64)
    slot_id = np.zeros(k * width, np.int64)
    slot_logprob = np.zeros(k * width, np.float32)
    total = np.zeros(k * width, np.float64)
    for r in range(len(kind)):
        to_gold = pivot_gold[r]
        if kind[r] == _NONE:
            if unaligned == 0 and k:
                out_ids[r, 0], out[r, 0] = to_gold, 0.0
            continue
        s = source_row[r]
        if kind[r] == _FINER:
            out_gold[r] = _chain(
                s, chain[r], to_gold, rest_bytes[r], ids, magnitude, gold_logprob, gold,
                source_bytes, pivot_bytes, probability,
            )  # fmt: skip
            if finer != 1:
                if k:
                    out_ids[r, 0], out[r, 0] = to_gold, (0.0 if finer == 2 else -abs(out_gold[r]))
                continue
        on_gold = np.exp(np.float64(gold_logprob[s]))
        n, in_order = 0, True
        for j in range(k):
            if magnitude[s, j] == 0x7C00:
                continue
            token = ids[s, j]
            m = map_index[r]
            p = np.float64(probability[magnitude[s, j]])
            units = np.uint64(p * _MASS_UNIT + 0.5)
            is_gold = kind[r] != _FINER and token == gold[s]
            fixed = is_gold or (ends_turn[r] and source_ends_turn[token])
            if not fixed and map_target[m, token, 0] < 0:
                mass[kind[r], _LOST] += units
                lost[token] += units
                continue
            mass[kind[r], _EXACT if fixed else map_quality[m, token]] += units
            for w in range(1 if fixed else width):
                to = to_gold if fixed else map_target[m, token, w]
                if to < 0:
                    break
                share = p if fixed or width == 1 else p * map_weight[m, token, w]
                if to == to_gold and not is_gold:
                    on_gold += share
                if stamp[to] != r:
                    stamp[to], slot_of[to], slot_id[n], total[n] = r, n, to, share
                    if fixed or width == 1:
                        # As stored, not as log(exp(·)): an entry without collision comes through bit for bit.
                        slot_logprob[n] = -_half(magnitude[s, j])
                    else:
                        slot_logprob[n] = _log_half(share)
                    n += 1
                elif sums:
                    in_order = False
                    slot = slot_of[to]
                    total[slot] += share
                    slot_logprob[slot] = _log_half(total[slot])
                in_order &= fixed or width == 1
        if not in_order:
            _sort(slot_id, slot_logprob, n)
        for j in range(min(n, k)):
            out_ids[r, j], out[r, j] = slot_id[j], slot_logprob[j]
        if kind[r] == _SAME:
            out_gold[r] = gold_logprob[s]
        elif kind[r] == _COARSER:
            out_gold[r] = min(np.log(on_gold), 0.0)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _half(bits: int) -> float:
    exponent, fraction = np.int64(bits) >> 10, np.float64(np.int64(bits) & 0x3FF)
    return fraction * 2.0**-24 if exponent == 0 else (1024.0 + fraction) * 2.0 ** (exponent - 25)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _log_half(probability: float) -> Any:
    """The logarithm as it will be stored, to the nearest half: rows are put in the order of what is stored."""
    size = abs(np.float64(np.float32(min(np.log(probability), 0.0))))
    _, exponent = math.frexp(size)
    unit = 2.0 ** max(exponent - 11, -24)
    return -np.rint(size / unit) * unit


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _sort(row_ids: Array, row: Array, n: int) -> None:
    for i in range(1, n):
        token, logprob = row_ids[i], row[i]
        j = i
        while j > 0 and row[j - 1] < logprob:
            row_ids[j], row[j] = row_ids[j - 1], row[j - 1]
            j -= 1
        row_ids[j], row[j] = token, logprob


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _chain(
    s: int, chain: int, to_gold: int, rest_bytes: int, ids: Array, magnitude: Array, gold_logprob: Array,
    gold: Array, source_bytes: Any, pivot_bytes: Any, probability: Array,
) -> float:  # fmt: skip
    logprob = 0.0
    for i in range(s, s + chain - (1 if rest_bytes > 0 else 0)):
        logprob += gold_logprob[i]
    if rest_bytes > 0:
        last = s + chain - 1
        end = pivot_bytes[1][to_gold + 1]
        begin = max(pivot_bytes[1][to_gold], end - rest_bytes)
        total = np.exp(np.float64(gold_logprob[last]))
        for j in range(ids.shape[1]):
            token = ids[last, j]
            if magnitude[last, j] == 0x7C00 or token == gold[last]:
                continue
            first, stop = source_bytes[1][token], source_bytes[1][token + 1]
            if stop - first < end - begin:
                continue
            same = True
            for b in range(end - begin):
                if source_bytes[0][first + b] != pivot_bytes[0][begin + b]:
                    same = False
                    break
            if same:
                total += probability[magnitude[last, j]]
        logprob += np.log(total)
    return min(logprob, 0.0)
