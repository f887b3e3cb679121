"""Prefix cells: what a source row says of the pivot's vocabulary when its next token ends before the pivot's.

Such a row speaks of the next few bytes only: a candidate's probability is that of *all* pivot tokens that begin with
its bytes. In the byte order of the vocabulary those are one range. The pivot's own next token alone has a probability
of its own, the source's along its bytes (chain), and the other tokens that begin with the source's actual next token
share the rest of that token's mass.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusechat.align.rows import Matches, Remapped, RowKind, RowView
from fusechat.bytetable import ByteTable, Role

Array = npt.NDArray[Any]

EXTRA_ENTRIES = 2
"""The pivot's next token and the source's, which the K candidates may lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellMap:
    """The pivot tokens every source token's bytes begin: places low … high − 1 of the byte order, int32[Vs].

    Where no pivot token begins with them, `target` int32[Vs] is the single id that takes the mass (−1: none).
    """

    low: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]


class CellRows(NamedTuple):
    """Finer rows, in their order, [F,K+2]: log-probabilities of single ids and of ranges of the byte order.

    An entry with `high` > `low` is the tokens order[low] … order[high − 1] that lie in no smaller range of the row and
    are none of its single ids; its id is 0. Any other entry is a single id. Absent entries: all 0, log-probability
    −inf. The first entry is the pivot's next token. What is missing to 1 belongs to all other tokens.
    """

    ids: Array
    logprobs: Array
    low: Array
    high: Array


def byte_order(table: ByteTable) -> npt.NDArray[np.int32]:
    """Return all ids, text tokens first in lexicographic order of their bytes, int32[V].

    Tokens that are no text follow by id: no prefix reaches them. Equal bytes stand by id.
    """
    text = np.flatnonzero(table.roles == Role.TEXT).tolist()
    rest = np.flatnonzero(table.roles != Role.TEXT).tolist()
    tokens = table.tokens()
    return np.array(sorted(text, key=lambda i: (tokens[i], i)) + rest, np.int32)


def cell_map(
    source: ByteTable,
    pivot: ByteTable,
    order: npt.NDArray[np.int32],
    target: npt.NDArray[np.int32],
    *,
    source_lead: bytes = b"",
    pivot_lead: bytes = b"",
) -> CellMap:
    """Find every source token's range; `target` [Vs] is the `prefix` map under the same leads."""
    n_text = int((pivot.roles == Role.TEXT).sum())
    pivot_tokens, source_tokens = pivot.tokens(), source.tokens()
    tokens = [pivot_tokens[i] for i in order[:n_text].tolist()]
    low, high = np.zeros(len(source), np.int32), np.zeros(len(source), np.int32)
    for i in np.flatnonzero(source.roles == Role.TEXT).tolist():
        data = pivot_lead + source_tokens[i].removeprefix(source_lead)
        if not data:
            continue
        low[i] = bisect.bisect_left(tokens, data)
        after = _successor(data)
        high[i] = n_text if after is None else bisect.bisect_left(tokens, after, int(low[i]))
    return CellMap(low=low, high=high, target=target)


def _successor(data: bytes) -> bytes | None:
    """Return the least byte string above all that begin with `data`; None when there is none."""
    stem = data.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def cell_rows(
    matches: Matches,
    remapped: Remapped,
    pivot: RowView,
    source: RowView,
    map_index: npt.NDArray[np.int16],
    maps: list[CellMap],
) -> CellRows:
    """Return the cells of every finer row; `remapped` holds their chains, `map_index` the map of every row."""
    rows = np.flatnonzero(matches.kind == RowKind.FINER)
    width = source.block["row.ids"].shape[1] + EXTRA_ENTRIES
    ids = np.zeros((len(rows), width), remapped.ids.dtype)
    probabilities = np.zeros((len(rows), width), np.float64)
    low, high = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    if len(rows):
        # Loaded where it is needed: numba is slow to import, and most stores are read without it.
        from fusechat.align.cells_kernel import fill

        source_rows = matches.source_row[rows]
        used, map_of = np.unique(map_index[rows], return_inverse=True)
        fill(
            pivot.gold[rows],
            np.exp(remapped.gold_logprob[rows].astype(np.float64)),
            source_rows,
            map_of,
            source.block["row.ids"][source_rows],
            np.exp(source.block["row.logprobs"][source_rows].astype(np.float64)),
            source.gold[source_rows],
            np.exp(source.block["row.gold_logprob"][source_rows].astype(np.float64)),
            np.stack([maps[m].low for m in used]),
            np.stack([maps[m].high for m in used]),
            np.stack([maps[m].target for m in used]),
            (ids, probabilities, low, high),
        )
    with np.errstate(divide="ignore"):
        logprobs = np.minimum(np.log(probabilities), 0).astype(np.float16)
    return CellRows(ids=ids, logprobs=logprobs, low=low, high=high)
