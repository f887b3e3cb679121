"""The places where two tokenizations stand before the same text, and what two models predict there.

Two tokenizations share a place when both have a token boundary at the same byte of the same assistant turn; there both
models predict what follows the same prefix. Tokens are compared by their bytes, ends of turns with each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusechat.bytetable import ByteTable, Role
from fusechat.records import Encoded
from fusechat.store import row_positions

_LEAST = 1e-12

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def row_places(encoded: Encoded) -> tuple[Ints, Ints]:
    """Return the places of a dialogue's rows, ascending and unique, and the position of each row.

    A place is turn·2³² + the byte of the turn's content at which the predicted text begins. Of several rows at one
    place (tokens without width) the last counts, which predicts the text itself.
    """
    positions = row_positions(encoded.loss_mask).astype(np.int64)
    inside = encoded.turn[positions] == encoded.turn[positions + 1]
    start = np.where(inside, encoded.byte_end[positions], 0).astype(np.int64)
    places = (encoded.turn[positions + 1].astype(np.int64) << 32) + start
    unique, from_behind = np.unique(places[::-1], return_index=True)
    return unique, positions[len(positions) - 1 - from_behind]


def twins(model: ByteTable, model_end: int | None, source: ByteTable, source_end: int | None) -> tuple[Ints, Ints]:
    """Return for every token of the model, and for every token of the source, the model's token of the same bytes.

    Of several tokens of the same bytes the lowest id stands for all; special tokens go with special tokens of the same
    spelling, and the end of turns with the end of turns. Tokens without a twin are −1.
    """
    by_bytes: dict[tuple[bool, bytes], int] = {}
    own = np.full(len(model), -1, np.int64)
    for i in np.flatnonzero(model.widths > 0):
        own[i] = by_bytes.setdefault((bool(model.roles[i] == Role.TEXT), model.token(int(i))), int(i))
    theirs = np.full(len(source), -1, np.int64)
    for i in np.flatnonzero(source.widths > 0):
        theirs[i] = by_bytes.get((bool(source.roles[i] == Role.TEXT), source.token(int(i))), -1)
    if model_end is not None and source_end is not None:
        theirs[source_end] = own[model_end]
    return own, theirs


def measure_rows(
    own_top: Ints, own_twin: Ints, source_top: Ints, source_twin: Ints, source_p: Floats, model_p: Floats
) -> dict[str, Floats]:
    """Return `top1`, `topk` and `kl_bits` per row, float64[R].

    `own_top`, `source_top` int64[R,K] are the candidates, `own_twin`, `source_twin` the maps of `twins`;
    `source_p` float64[R,K] their probabilities; `model_p` float64[R,K] the model's of each candidate's twin (anything
    where there is none).
    """
    ours, theirs = own_twin[own_top], source_twin[source_top]
    # Candidates of the same bytes are one cell: its mass goes to the first.
    same = (theirs[:, :, None] == theirs[:, None, :]) & (theirs >= 0)[:, None, :]
    first = (theirs >= 0) & ~np.tril(same, -1).any(axis=2)
    p = np.where(first, (same * source_p[:, None, :]).sum(axis=2), 0.0)
    q = np.where(first, model_p, 0.0)
    among = first & (theirs[:, :, None] == ours[:, None, :]).any(axis=2)

    def term(p: Floats, q: Floats) -> Floats:
        return np.where(p > 0, p * np.log(np.maximum(p, _LEAST) / np.maximum(q, _LEAST)), 0.0)

    rest_p, rest_q = 1.0 - p.sum(axis=1), 1.0 - q.sum(axis=1)
    return {
        "top1": ((ours[:, 0] == theirs[:, 0]) & (theirs[:, 0] >= 0)).astype(np.float64),
        "topk": among.sum(axis=1) / np.maximum(first.sum(axis=1), 1),
        "kl_bits": (term(p, q).sum(axis=1) + term(np.maximum(rest_p, 0.0), rest_q)) / np.log(2.0),
    }


def prefix_agreement(own_top: Ints, model: ByteTable, source_top: Ints, source: ByteTable, top1: Floats) -> Floats:
    """Return per row whether the one's first choice begins with the other's; specials agree only as `top1` says."""
    pairs, back = np.unique(np.stack([own_top[:, 0], source_top[:, 0]], axis=1), axis=0, return_inverse=True)
    begins = np.zeros(len(pairs))
    for n, (a, b) in enumerate(pairs):
        if model.roles[a] == Role.TEXT and source.roles[b] == Role.TEXT:
            ours, theirs = model.token(int(a)), source.token(int(b))
            begins[n] = bool(ours and theirs) and (ours.startswith(theirs) or theirs.startswith(ours))
    return np.maximum(begins[back.reshape(-1)], top1)
