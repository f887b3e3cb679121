"""Bits per byte of the assistant's text: comparable across tokenizers, since every model spends them on the same bytes.

bpb = Σ −log₂ p(assistant tokens) / Σ UTF-8 bytes of the assistant's content. The token that ends a turn is counted in
the numerator: a model must also know when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.bytetable import ByteTable
from fusechat.checkpoint import resolve_model
from fusechat.encode import encode_all
from fusechat.errors import DataError
from fusechat.extract.hf import score_rows
from fusechat.model import check_head, context_tokens, embedding_rows, load_model
from fusechat.records import Dialogue
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer

NATS_PER_BIT = float(np.log(2.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Per dialogue: nll float64[n] in nats over its assistant tokens (NaN where the model could not be scored), content
    bytes int64[n]."""

    nll: npt.NDArray[np.float64]
    content_bytes: npt.NDArray[np.int64]


def score_dialogues(
    model: str,
    dialogues: Sequence[Dialogue],
    *,
    template: str = "own",
    max_length_tokens: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int = 8192,
) -> Scores:
    """Score a model on every dialogue in full; one it would cut or skip is NaN: the bytes would differ."""
    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory)
    lm = load_model(directory, dtype=dtype, device=device)
    table = ByteTable.from_tokenizer(tokenizer, embedding_rows(lm))
    encodings = encode_all(
        dialogues,
        tokenizer,
        table,
        template=load_template(tokenizer, template),
        max_length_tokens=context_tokens(lm.config, max_length_tokens),
    )
    content_bytes = np.array(
        [sum(len(m.content.encode()) for m in d.messages if m.role == "assistant") for d in dialogues], dtype=np.int64
    )
    nll = np.full(len(dialogues), np.nan)
    check_head(lm, encodings.encoded[0].input_ids)
    scores = score_rows(lm, encodings.encoded, top_k=1, batch_tokens=batch_tokens)
    for dialogue, score in zip(encodings.index, scores):
        if not np.isfinite(score.gold_logprob).all():
            raise DataError(f"{model} gives NaN or infinite logits on held-out dialogue {dialogue}: it is broken")
        if dialogue not in encodings.cut_turns:
            nll[dialogue] = -score.gold_logprob.sum(dtype=np.float64)
    return Scores(nll=nll, content_bytes=content_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the bounds."""
        return self.low > 0 or self.high < 0


def bits_per_byte(
    scores: Mapping[str, Scores],
    members: npt.NDArray[np.int64],
    *,
    against: str,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Return each model's bits per byte over the dialogues `members`, and its paired difference to the model `against`.

    Intervals are percentile bootstraps over dialogues; all models share the resamples, which is what pairs them.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(members), np.full(len(members), 1.0 / len(members)), size=samples)
    bounds = [(1 - confidence) / 2, (1 + confidence) / 2]

    def value(name: str) -> tuple[float, npt.NDArray[np.float64]]:
        nll, size = scores[name].nll[members] / NATS_PER_BIT, scores[name].content_bytes[members]
        return float(nll.sum() / size.sum()), (counts @ nll) / (counts @ size)

    def interval(point: float, resampled: npt.NDArray[np.float64]) -> Interval:
        low, high = np.quantile(resampled, bounds)
        return Interval(value=point, low=float(low), high=float(high))

    base_point, base_resampled = value(against)
    levels, gains = {}, {}
    for name in scores:
        point, resampled = value(name)
        levels[name] = interval(point, resampled)
        gains[name] = interval(point - base_point, resampled - base_resampled)
    return levels, gains


def common_dialogues(scores: Mapping[str, Scores]) -> npt.NDArray[np.int64]:
    """Return the dialogues every model was scored on, as indices; raises DataError when there are none."""
    known = np.all([np.isfinite(s.nll) & (s.content_bytes > 0) for s in scores.values()], axis=0)
    if not known.any():
        raise DataError("no held-out dialogue fits the context of every model: use shorter ones")
    return np.flatnonzero(known)


def results_table(
    scores: Mapping[str, Scores],
    dialogues: Sequence[Dialogue],
    *,
    against: str,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Return bits per byte by category and overall, and the paired differences to `against`, as JSON values."""
    common = common_dialogues(scores)
    categories = sorted({dialogues[i].category for i in common} - {""})
    groups = {"overall": common} | {
        category: np.array([i for i in common if dialogues[i].category == category]) for category in categories
    }
    table: dict[str, Any] = {
        "n_dialogues": len(common),
        "excluded_dialogues": len(dialogues) - len(common),
        "groups": {},
    }
    for name, members in groups.items():
        levels, gains = bits_per_byte(
            scores, members, against=against, samples=samples, confidence=confidence, seed=seed
        )
        table["groups"][name] = {
            "n_dialogues": len(members),
            "content_bytes": int(scores[against].content_bytes[members].sum()),
            "models": {
                model: {
                    "bits_per_byte": [levels[model].value, levels[model].low, levels[model].high],
                    f"difference_to_{against}": [gains[model].value, gains[model].low, gains[model].high],
                }
                for model in scores
            },
        }
    return table


def score_models(
    models: Mapping[str, Path | str],
    dialogues: Sequence[Dialogue],
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Scores]:
    """Score several models on the same dialogues, one after another; `progress(done_models, all_models)`."""
    scores = {}
    for name, model in models.items():
        scores[name] = score_dialogues(str(model), dialogues, **options)
        if progress is not None:
            progress(len(scores), len(models))
    return scores
