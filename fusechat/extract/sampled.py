"""Random-sampling distillation's cache: k draws of each row's distribution instead of its k likeliest tokens.

The top k, renormalised or with their tail, are a biased picture: what is rare is never taught. Draws with replacement,
each token weighted by how often it came, are an unbiased estimate of the whole distribution at the same storage
(arXiv 2503.16870, with the distribution itself as proposal). The weights sum to one, so whatever the loss does with
missing mass does nothing here. Draws are keyed by seed and dialogue, so that batches and shards do not change them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def uniforms(seed: int, dialogue: int, n_rows: int, k: int) -> npt.NDArray[np.float64]:
    """Return the random numbers in [0, 1) that decide a dialogue's draws, float64[R, k]."""
    return np.random.Generator(np.random.Philox(key=[seed, dialogue])).random((n_rows, k))


def weights_of_draws(
    draws: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Turn draws int64[R, k] into distinct ids int32[R, k] and log weights float32[R, k], most frequent first.

    The weight of a token drawn c times is c / k. Entries beyond the distinct tokens have id 0 and −inf.
    """
    n_rows, k = draws.shape
    ordered = np.sort(draws, axis=1)
    first = np.ones((n_rows, k), dtype=np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # A run ends where the next one begins: the distance between their places is the count.
    place = np.where(first, np.arange(k), k)
    following = np.minimum.accumulate(place[:, ::-1], axis=1)[:, ::-1]
    following = np.concatenate([following[:, 1:], np.full((n_rows, 1), k)], axis=1)
    count = np.where(first, following - np.arange(k), 0)
    best = np.argsort(-count, axis=1, kind="stable")
    count = np.take_along_axis(count, best, axis=1)
    ids = np.where(count > 0, np.take_along_axis(ordered, best, axis=1), 0).astype(np.int32)
    with np.errstate(divide="ignore"):
        return ids, np.log(count / k).astype(np.float32)


def uniforms_of(seed: int, dialogues: Sequence[int], n_rows: Sequence[int], k: int) -> npt.NDArray[np.float64]:
    """Return the random numbers of several dialogues, one after another, float64[ΣR, k]."""
    return np.concatenate([uniforms(seed, d, n, k) for d, n in zip(dialogues, n_rows, strict=True)])
