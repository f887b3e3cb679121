"""The gold tokens of a TopKStore as they lie on disk: by their place among the K ids of their row.

The token that follows a row is an input id, and nearly always one of the row's K, whose float16 log-probability is its
own rounded. So a row stores the place, and what the rounding took from the float32; only a token that is none of the K
is stored itself. At K = 10 the 4 bytes of `row.gold_logprob` and the 2 of the token's id become 3.

    given.input_ids   the tokens that no row predicts, as token.input_ids
    row.rank          uint8, the gold token's place among the row's ids, 255 if it has none
    found.rest        int16, bits of the float32 gold log-probability minus those of the row's rounded one
    missed.input_ids, missed.gold_logprob   of the rows of rank 255
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

GOLD_COLUMNS = ("given.input_ids", "row.rank", "found.rest", "missed.input_ids", "missed.gold_logprob")
MISSED = 255
_REST = np.iinfo(np.int16)


def pack_gold(columns: Columns, predicted: npt.NDArray[np.bool_]) -> dict[str, Array] | None:
    """Return the columns that replace `token.input_ids` and `row.gold_logprob`; None where that would not be smaller.

    `predicted` bool[T] marks the tokens that a row predicts, in the rows' order.
    """
    ids, gold_logprob = columns["token.input_ids"], columns["row.gold_logprob"]
    rank, rest = _places(columns["row.ids"], columns["row.logprobs"], ids[predicted], gold_logprob)
    missed = rank == MISSED
    packed = {
        "given.input_ids": ids[~predicted],
        "row.rank": rank,
        "found.rest": rest[~missed].astype(np.int16),
        "missed.input_ids": ids[predicted][missed],
        "missed.gold_logprob": gold_logprob[missed],
    }
    smaller = sum(values.nbytes for values in packed.values()) < ids.nbytes + gold_logprob.nbytes
    return packed if smaller else None


def _places(
    row_ids: Array, logprobs: Array, gold: Array, gold_logprob: Array
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return each row's rank uint8[R] and rest int64[R], of ranks with which the gold log-probability is whole."""
    match = row_ids[:, :MISSED] == gold[:, None]
    rank = match.argmax(axis=1)
    rest = _bits(gold_logprob) - _bits(logprobs[np.arange(len(rank)), rank])
    whole = match.any(axis=1) & (rest >= _REST.min) & (rest <= _REST.max)
    return np.where(whole, rank, MISSED).astype(np.uint8), rest


def _bits(values: Array) -> npt.NDArray[np.int64]:
    return values.astype(np.float32).view(np.int32).astype(np.int64)


def unpack_gold(columns: Columns, predicted: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return `token.input_ids` int32[T] and `row.gold_logprob` float32[R] from the packed columns."""
    rank, row_ids = columns["row.rank"], columns["row.ids"]
    missed = rank == MISSED
    row = np.flatnonzero(~missed)
    place = row * row_ids.shape[1] + rank[row]
    gold = np.empty(len(rank), dtype=np.int32)
    gold[row] = row_ids.reshape(-1).take(place)
    gold[missed] = columns["missed.input_ids"]
    rounded = columns["row.logprobs"].reshape(-1).take(place).astype(np.float32)
    logprob = np.empty(len(rank), dtype=np.float32)
    logprob[row] = (rounded.view(np.int32) + columns["found.rest"]).view(np.float32)
    logprob[missed] = columns["missed.gold_logprob"]
    ids = np.empty(len(predicted), dtype=np.int32)
    ids[predicted] = gold
    ids[~predicted] = columns["given.input_ids"]
    return ids, logprob


def ranks_fit(columns: Columns) -> bool:
    """Return whether every rank is a place of the row's ids, or says that there is none."""
    rank, k = columns["row.rank"], columns["row.ids"].shape[1]
    return bool(((rank < k) | (rank == MISSED)).all())
