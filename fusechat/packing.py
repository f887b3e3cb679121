"""The columns of a TopKStore as they lie on disk: what follows from something else is not stored.

An assistant turn is a run of tokens, so turns are stored instead of `token.turn`, and `token.loss_mask` follows; a
token's end is the one before it plus its width, which fits a byte. 13 bytes a token become 2 or 4, and 1 more where it
is the assistant's. The ids and log-probabilities of gold tokens go by their place in their rows (packed_gold.py) where
that is smaller.

    token.input_ids   uint16 where every id fits, else int32
    turn.begin, turn.end, turn.number   int32, a run of tokens of one turn, counted from its dialogue's first token
    masked.width      uint8, the bytes of message text that each assistant token adds
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.packed_gold import GOLD_COLUMNS, MISSED, pack_gold, ranks_fit, unpack_gold

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

TOKEN_COLUMNS = ("token.input_ids", "token.loss_mask", "token.turn", "token.byte_end")
_TURN_COLUMNS = ("turn.begin", "turn.end", "turn.number", "masked.width")
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
    packed = {name: values for name, values in columns.items() if name not in TOKEN_COLUMNS}
    packed["token.input_ids"] = ids.astype(np.uint16) if len(ids) and ids.max() <= _MAX_UINT16 else ids
    packed |= {
        "turn.begin": (begin - first).astype(np.int32),
        "turn.end": (end - first).astype(np.int32),
        "turn.number": turn[begin].astype(np.int32),
        "masked.width": width.astype(np.uint8),
    }
    n = len(offsets["token"]) - 1
    ends = {"turn": _ends(np.bincount(dialogue, minlength=n)), "masked": _ends(_count(mask, offsets["token"]))}
    return _with_gold(packed, {**offsets, **ends}, _predicted(mask, offsets["token"]))


def _with_gold(
    columns: dict[str, Array], offsets: Columns, predicted: npt.NDArray[np.bool_]
) -> tuple[Columns, Columns]:
    """Replace ids and gold log-probabilities by their packed form, where rows are of `predicted` and it is smaller."""
    if not all(name in columns for name in ("row.ids", "row.logprobs", "row.gold_logprob")):
        return columns, offsets
    n_rows = _count(predicted, offsets["token"])
    gold = pack_gold(columns, predicted) if np.array_equal(n_rows, np.diff(offsets["row"])) else None
    if gold is None:
        return columns, offsets
    missed = _count(gold["row.rank"] == MISSED, offsets["row"])
    rest = {name: values for name, values in columns.items() if name not in ("token.input_ids", "row.gold_logprob")}
    ends = {
        "given": offsets["token"] - offsets["row"],
        "missed": _ends(missed),
        "found": _ends(n_rows - missed),
    }
    return rest | gold, {**offsets, **ends}


def _predicted(mask: npt.NDArray[np.bool_], token_offsets: Array) -> npt.NDArray[np.bool_]:
    """Return which tokens a row predicts: the assistant's, but for a dialogue's first."""
    predicted = np.append(mask, False)  # one more, for a last dialogue without tokens
    predicted[token_offsets[:-1]] = False
    return predicted[:-1]


def _count(values: npt.NDArray[np.bool_], offsets: Array) -> npt.NDArray[np.int64]:
    """Return how many are true in each of the consecutive parts."""
    return np.diff(_ends(values)[offsets])


def _ends(counts: Array) -> npt.NDArray[np.int64]:
    return np.append(0, np.cumsum(counts, dtype=np.int64))


def is_packed(columns: Columns) -> bool:
    """Return whether the token columns are packed."""
    return "turn.begin" in columns


def unpacked_names(names: Iterable[str]) -> list[str]:
    """Return the columns that a shard with packed columns of these names has for its readers."""
    kept = [name for name in names if name not in (*_TURN_COLUMNS, *GOLD_COLUMNS, *TOKEN_COLUMNS)]
    return [*kept, *TOKEN_COLUMNS, *(["row.gold_logprob"] if "row.rank" in names else [])]


def unpack(columns: Columns, token_offsets: Array, turn_offsets: Array) -> dict[str, Array]:
    """Return the columns as the rest of the program knows them; what is not packed is passed on.

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
    mask = turn >= 0
    unpacked = {name: values for name, values in columns.items() if name not in (*_TURN_COLUMNS, *GOLD_COLUMNS)}
    if "row.rank" in columns:
        ids, unpacked["row.gold_logprob"] = unpack_gold(columns, _predicted(mask, token_offsets))
    else:
        ids = columns["token.input_ids"].astype(np.int32)
    return unpacked | {"token.input_ids": ids, "token.loss_mask": mask, "token.turn": turn, "token.byte_end": byte_end}


def what_does_not_fit(columns: Columns, offsets: Columns) -> str | None:
    """Name what of a shard's packed columns contradicts the rest: `turns`, `gold tokens`, or nothing."""
    begin, end = columns["turn.begin"].astype(np.int64), columns["turn.end"].astype(np.int64)
    dialogue = np.repeat(np.arange(len(offsets["turn"]) - 1), np.diff(offsets["turn"]))
    masked = np.zeros(len(offsets["turn"]) - 1, dtype=np.int64)
    np.add.at(masked, dialogue, end - begin)
    within = (begin >= 0) & (begin <= end) & (end <= np.diff(offsets["token"])[dialogue])
    apart = (begin[1:] >= end[:-1]) | (dialogue[1:] != dialogue[:-1])
    if not within.all() or not apart.all() or not np.array_equal(masked, np.diff(offsets["masked"])):
        return "turns"
    if "row.rank" in columns:
        np.subtract.at(masked, dialogue[(begin == 0) & (end > 0)], 1)  # no row predicts a dialogue's first token
        fit = (
            all(name in columns for name in GOLD_COLUMNS)
            and np.array_equal(masked, np.diff(offsets["row"]))
            and np.array_equal(offsets["token"], offsets["given"] + offsets["row"])
            and np.array_equal(offsets["row"], offsets["found"] + offsets["missed"])
            and np.array_equal(np.diff(offsets["missed"]), _count(columns["row.rank"] == MISSED, offsets["row"]))
            and ranks_fit(columns)
        )
        return None if fit else "gold tokens"
    return None
