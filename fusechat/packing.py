"""The token columns of a TopKStore as they lie on disk: what follows from something else is not stored.

An assistant turn is a run of tokens, so turns are stored instead of `token.turn`, and `token.loss_mask` follows; a
token's end is the one before it plus its width, which fits a byte. 13 bytes a token become 2 or 4, and 1 more where it
is the assistant's.

    token.input_ids   uint16 where every id fits, else int32
    turn.begin, turn.end, turn.number   int32, a run of tokens of one turn, counted from its dialogue's first token
    masked.width      uint8, the bytes of message text that each assistant token adds
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

TOKEN_COLUMNS = ("token.input_ids", "token.loss_mask", "token.turn", "token.byte_end")
_PACKED = ("turn.begin", "turn.end", "turn.number", "masked.width")
_MAX_UINT16 = np.iinfo(np.uint16).max
_MAX_WIDTH = np.iinfo(np.uint8).max


def pack(columns: Columns, offsets: Columns) -> tuple[Columns, Columns]:
    """Return columns and offsets with the token columns packed; as they are where that would lose anything.

    It would where turns are no runs, the mask is not theirs, an end moves back within its turn, or a token is wider
    than 255 bytes.
    """
    if not all(name in columns for name in TOKEN_COLUMNS):
        return columns, offsets
    ids, mask, turn, byte_end = (columns[name] for name in TOKEN_COLUMNS)
    starts = offsets["token"][:-1][np.diff(offsets["token"]) > 0]
    changes = np.ones(len(turn), dtype=np.bool_)
    changes[1:] = turn[1:] != turn[:-1]
    changes[starts] = True
    begin = np.flatnonzero(changes)
    end = np.append(begin[1:], len(turn))
    taught = turn[begin] >= 0
    before = np.zeros(len(byte_end), dtype=np.int64)
    before[1:] = byte_end[:-1]
    before[begin] = 0
    width = (byte_end - before)[mask]
    lossless = (
        np.array_equal(mask, turn >= 0)
        and (byte_end[~mask] == -1).all()
        and (turn[~mask] == -1).all()
        and (len(width) == 0 or (width.min() >= 0 and width.max() <= _MAX_WIDTH))
        and (len(ids) == 0 or ids.min() >= 0)
    )
    if not lossless:
        return columns, offsets
    begin, end = begin[taught], end[taught]
    dialogue = np.searchsorted(offsets["token"], begin, side="right") - 1
    first = offsets["token"][dialogue]
    n = len(offsets["token"]) - 1
    packed = {name: values for name, values in columns.items() if name not in TOKEN_COLUMNS}
    packed["token.input_ids"] = ids.astype(np.uint16) if len(ids) and ids.max() <= _MAX_UINT16 else ids
    packed |= {
        "turn.begin": (begin - first).astype(np.int32),
        "turn.end": (end - first).astype(np.int32),
        "turn.number": turn[begin].astype(np.int32),
        "masked.width": width.astype(np.uint8),
    }
    counts = {
        "turn": np.bincount(dialogue, minlength=n),
        "masked": np.add.reduceat(np.append(mask, 0), offsets["token"][:-1]),
    }
    ends = {axis: np.append(0, np.cumsum(count)).astype(np.int64) for axis, count in counts.items()}
    return packed, {**offsets, **ends}


def is_packed(columns: Columns) -> bool:
    """Return whether the token columns are packed."""
    return "turn.begin" in columns


def unpack(columns: Columns, token_offsets: Array, turn_offsets: Array) -> dict[str, Array]:
    """Return the columns with the token columns as the rest of the program knows them; the others are passed on.

    The offsets are of consecutive dialogues, from 0.
    """
    n_tokens = int(token_offsets[-1])
    width = columns["masked.width"].astype(np.int32)
    turn = np.full(n_tokens, -1, dtype=np.int32)
    byte_end = np.full(n_tokens, -1, dtype=np.int32)
    if len(turn_offsets) == 2:
        first = [0] * len(columns["turn.begin"])
    else:
        first = np.repeat(token_offsets[:-1], np.diff(turn_offsets)).tolist()
    place = 0
    runs = zip(first, columns["turn.begin"].tolist(), columns["turn.end"].tolist(), columns["turn.number"].tolist())
    for offset, begin, end, number in runs:
        turn[offset + begin : offset + end] = number
        np.cumsum(width[place : place + end - begin], out=byte_end[offset + begin : offset + end])
        place += end - begin
    unpacked = {name: values for name, values in columns.items() if name not in _PACKED}
    unpacked["token.input_ids"] = columns["token.input_ids"].astype(np.int32)
    unpacked["token.loss_mask"] = turn >= 0
    unpacked["token.turn"] = turn
    unpacked["token.byte_end"] = byte_end
    return unpacked
