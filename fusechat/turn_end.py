"""The token that ends a model's turns: of several that could, its texts tell which one does."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fusechat.bytetable import ByteTable, Role

Ints = npt.NDArray[np.integer]


def turn_end_token(blocks: Iterable[tuple[Ints, Ints, Ints]], table: ByteTable) -> int | None:
    """Return the special token that most often ends a turn, None when turns end without one.

    A block is the token ids int[T] of some dialogues, their turns int[T], −1 where a token is no answer's, and their
    offsets int[n+1].
    """
    counts = np.zeros(len(table), np.int64)
    for ids, turn, offsets in blocks:
        following = np.append(turn[1:], -1)
        following[offsets[1:-1] - 1] = -1  # the next dialogue's turns are others, whatever their numbers
        last = ids[(turn >= 0) & (following != turn)]
        np.add.at(counts, last[table.roles[last] != Role.TEXT], 1)
    return int(counts.argmax()) if counts.any() else None
