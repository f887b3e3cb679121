"""What every backend gives for a dialogue, and how prompt log-probabilities become it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.artifact import Json
from fusechat.errors import DataError
from fusechat.records import Encoded
from fusechat.store import row_positions


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScores:
    """Per row of one dialogue: ids int32[R,K], best first, logprobs float32[R,K], gold_logprob float32[R]."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    gold_logprob: npt.NDArray[np.float32]


Advance = Callable[[int], None]
Score = Callable[[Sequence[Encoded], Sequence[int], Advance], list[RowScores]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """An open backend.

    `score(encoded, dialogues, advance)` returns the rows of every sequence in the order given, calling `advance` with
    the number of tokens done now and then; `dialogues` are the sequences' places in the data set, for what is keyed by
    them. `engine` says what computed them: name, version, dtype, quantisation.
    """

    score: Score
    engine: Json


def rows_of_prompt(ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], encoded: Encoded) -> RowScores:
    """Pick a dialogue's rows from an engine's prompt log-probabilities, [T−1, K+1], the actual token's first.

    Entry i of the arrays is of token i+1 and was predicted from tokens 0..i, which is what row i means. Raises
    DataError when the first column is not the dialogue's own tokens: the engine is off by one, or not given them.
    """
    if len(ids) != len(encoded.input_ids) - 1 or not np.array_equal(ids[:, 0], encoded.input_ids[1:]):
        raise DataError(
            "the engine's prompt log-probabilities are not of the tokens it was sent: use another version of it"
        )
    rows = row_positions(encoded.loss_mask)
    return RowScores(ids=ids[rows, 1:], logprobs=logprobs[rows, 1:], gold_logprob=logprobs[rows, 0])


def check_scores(scores: Sequence[RowScores], dialogues: Sequence[int], model: str, vocab_size: int) -> None:
    """Raise DataError naming the model, the dialogue and the row of the first score that cannot be."""
    for score, dialogue in zip(scores, dialogues, strict=True):
        wrong = _first_wrong(score, vocab_size)
        if wrong is not None:
            raise DataError(f"{model} gives {wrong[1]} on dialogue {dialogue}, row {wrong[0]}: {wrong[2]}")


def _first_wrong(score: RowScores, vocab_size: int) -> tuple[int, str, str] | None:
    broken = "the model or its dtype is broken"
    kinds: tuple[tuple[Any, str, str], ...] = (
        (np.isnan(score.gold_logprob) | np.isnan(score.logprobs).any(axis=1), "NaN logits", broken),
        (~np.isfinite(score.gold_logprob), "the dialogue's own token an infinite log-probability", broken),
        (~np.isfinite(score.logprobs[:, 0]), "infinite logits", broken),
        (
            ((score.ids < 0) | (score.ids >= vocab_size)).any(axis=1),
            f"token ids outside its vocabulary of {vocab_size}",
            "it has another vocabulary than its config.json says",
        ),
    )
    for bad, what, mend in kinds:
        if bad.any():
            return int(np.flatnonzero(bad)[0]), what, mend
    return None
