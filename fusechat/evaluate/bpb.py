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
from fusechat.evaluate.bootstrap import SIGNIFICANCE, Ratio, compare, comparison_table, holm
from fusechat.extract.hf import score_rows
from fusechat.model import check_head, context_tokens, embedding_rows, load_model
from fusechat.records import Dialogue
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer

SCORES_FORMAT = "fusechat.scores"
NATS_PER_BIT = float(np.log(2.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Per dialogue: nll float64[n] in nats over its assistant tokens (NaN where the model could not be scored), content
    bytes int64[n]."""

    nll: npt.NDArray[np.float64]
    content_bytes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, nll: Sequence[float | None], content_bytes: Sequence[int]) -> Scores:
        """Return scores from JSON values, where null is NaN."""
        return cls(nll=np.array(nll, np.float64), content_bytes=np.array(content_bytes, np.int64))

    @property
    def nll_json(self) -> list[float | None]:
        """The nats as JSON values."""
        return [None if np.isnan(x) else float(x) for x in self.nll]


def score_dialogues(
    model: str,
    dialogues: Sequence[Dialogue],
    *,
    template: str = "own",
    max_length_tokens: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    batch_tokens: int = 8192,
    trust_remote_code: bool = False,
) -> Scores:
    """Score a model on every dialogue in full; one it would cut or skip is NaN: the bytes would differ."""
    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    lm = load_model(directory, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code)
    table = ByteTable.from_tokenizer(tokenizer, embedding_rows(lm))
    encodings = encode_all(
        dialogues,
        tokenizer,
        table,
        template=load_template(tokenizer, template),
        max_length_tokens=context_tokens(lm.config, max_length_tokens),
    )
    content_bytes = np.array([dialogue.answer_bytes for dialogue in dialogues], dtype=np.int64)
    nll = np.full(len(dialogues), np.nan)
    check_head(lm, encodings.encoded[0].input_ids)
    scores = score_rows(lm, encodings.encoded, top_k=1, batch_tokens=batch_tokens)
    for dialogue, score in zip(encodings.index, scores):
        if not np.isfinite(score.gold_logprob).all():
            raise DataError(f"{model} gives NaN or infinite logits on held-out dialogue {dialogue}: it is broken")
        if dialogue not in encodings.cut_turns:
            nll[dialogue] = -score.gold_logprob.sum(dtype=np.float64)
    return Scores(nll=nll, content_bytes=content_bytes)


def bits_per_byte(scores: Scores) -> Ratio:
    """Return bits over bytes, dialogue by dialogue."""
    return Ratio(numerator=scores.nll / NATS_PER_BIT, denominator=scores.content_bytes.astype(np.float64))


def common_dialogues(scores: Mapping[str, Scores]) -> npt.NDArray[np.int64]:
    """Return the dialogues every model was scored on, as indices; raises DataError when there are none."""
    known = np.all([np.isfinite(s.nll) & (s.content_bytes > 0) for s in scores.values()], axis=0)
    if not known.any():
        raise DataError("no held-out dialogue fits the context of every model: use shorter ones")
    return np.flatnonzero(known)


def category_groups(members: npt.NDArray[np.int64], categories: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the dialogues `members` as the group "overall", and again by category (of all dialogues, "" for none);
    raises DataError when a category is itself named "overall"."""
    names = sorted({categories[i] for i in members} - {""})
    if "overall" in names:
        raise DataError("a category of the dialogues is named 'overall', the name of the whole: rename it")
    return {"overall": members} | {name: np.array([i for i in members if categories[i] == name]) for name in names}


def results_table(
    scores: Mapping[str, Scores],
    dialogues: Sequence[Dialogue],
    *,
    against: str,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Return bits per byte overall and by category, and the paired differences to `against`, as JSON values."""
    common = common_dialogues(scores)
    groups = category_groups(common, [dialogue.category for dialogue in dialogues])
    compared = comparison_table(
        {
            group: {name: bits_per_byte(one).of(members) for name, one in scores.items()}
            for group, members in groups.items()
        },
        value_name="bits_per_byte",
        against=against,
        samples=samples,
        confidence=confidence,
        seed=seed,
    )
    return {
        "n_dialogues": len(common),
        "excluded_dialogues": len(dialogues) - len(common),
        "significance": SIGNIFICANCE,
        "groups": {
            name: {
                "n_dialogues": len(members),
                "content_bytes": int(scores[against].content_bytes[members].sum()),
                "models": compared[name],
            }
            for name, members in groups.items()
        },
    }


def paired_differences(
    scores: Mapping[str, Scores],
    *,
    of: str,
    to: Sequence[str],
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Return the difference in bits per byte of one model to each of several others, as JSON values.

    Dialogues are those every model in `scores` was scored on; `p_holm` counts the differences asked for.
    """
    common = common_dialogues(scores)
    compared = compare(
        {name: bits_per_byte(scores[name]).of(common) for name in (of, *to)},
        against=of, samples=samples, confidence=confidence, seed=seed,
    )  # fmt: skip
    p_holm = dict(zip(to, holm([compared[name].p for name in to]), strict=True))
    found = {}
    for name in to:
        there = compared[name].difference  # the other's to ours
        found[name] = {
            "difference": [-there.value, -there.high, -there.low],
            "p": compared[name].p,
            "p_holm": p_holm[name],
        }
    return found


def score_models(
    models: Mapping[str, Path | str],
    dialogues: Sequence[Dialogue],
    *,
    options: Mapping[str, Mapping[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Scores]:
    """Score several models on the same dialogues, one after another, each with its options of `score_dialogues`.

    `progress(done_models, all_models)` is called after each.
    """
    scores = {}
    for name, model in models.items():
        scores[name] = score_dialogues(str(model), dialogues, **options[name])
        if progress is not None:
            progress(len(scores), len(models))
    return scores
