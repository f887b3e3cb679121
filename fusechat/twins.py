"""A source whose vocabulary is the pivot's, byte by byte: its store needs no alignment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.artifact import MANIFEST
from fusechat.store import Store, same_vocabulary

TOTALS = ("source_nll", "pivot_nll", "source_tokens", "pivot_tokens", "content_bytes")


def are_twins(pivot: Path, source: Path) -> bool:
    """Return whether two TopKStores are there and whole, and have the same vocabulary."""
    return all((store / MANIFEST).exists() for store in (pivot, source)) and same_vocabulary(pivot, source)


def twin_totals(pivot: Store, source: Store) -> dict[int, tuple[float, ...]]:
    """Return, for each dialogue of which both stores have the same assistant tokens, the values of TOTALS."""
    found = {}
    for dialogue in source:
        if dialogue not in pivot:
            continue
        ours, theirs = pivot[dialogue], source[dialogue]
        tokens, same = (record["token.input_ids"][record["token.loss_mask"]] for record in (ours, theirs))
        if len(ours["row.ids"]) == len(theirs["row.ids"]) and np.array_equal(tokens, same):
            nll = [-float(record["row.gold_logprob"].sum(dtype=np.float64)) for record in (theirs, ours)]
            found[dialogue] = (*nll, len(tokens), len(tokens), _content_bytes(ours))
    return found


def _content_bytes(record: Mapping[str, Any]) -> int:
    turn, end = record["token.turn"], record["token.byte_end"]
    mask = record["token.loss_mask"]
    return sum(int(end[mask & (turn == t)].max(initial=0)) for t in np.unique(turn[mask]))
