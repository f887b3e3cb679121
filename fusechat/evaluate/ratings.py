"""What judgments say: mean ratings by category and turn, with intervals over questions, and how many say nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fusechat.artifact import Json
from fusechat.errors import DataError
from fusechat.evaluate.bootstrap import SIGNIFICANCE, Ratio, comparison_table
from fusechat.evaluate.mtbench import RATING_RANGE, UNPARSABLE, Question, in_range

Key = tuple[int | str, int]


def ratings_table(
    rows: Iterable[Json],
    questions: Mapping[int | str, Question],
    *,
    against: str | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return mean ratings overall, by turn and by category, with paired differences to `against`, as JSON values.

    Judgments without a rating and ratings off the scale are in no mean; both are counted, and `if_unrated` holds the
    mean if all of them were the scale's lowest or highest; `fastchat_mean` is what FastChat shows, which drops the
    former silently and counts the latter. `judge_sd` is the judge's own spread over repeated judging of the same
    answer. `against` is the first model unless given. Raises DataError for rows that are no judgments of these
    questions by one judge.
    """
    by_model = _by_model(rows, questions)
    against = next(iter(by_model)) if against is None else against
    if against not in by_model:
        raise DataError(f"there are no judgments of {against}, only of {', '.join(by_model)}")
    ids = list(questions)
    members = {"overall": ids}
    turns = {"overall": (1, 2), "turn 1": (1,), "turn 2": (2,)}
    for category in dict.fromkeys(q.category for q in questions.values()):
        if category:
            members[category] = [q for q in ids if questions[q].category == category]
    groups = {}
    for group in ["overall", "turn 1", "turn 2", *list(members)[1:]]:
        groups[group] = {
            model: _ratio(scores, members.get(group, ids), turns.get(group, (1, 2)))
            for model, scores in by_model.items()
        }
    table = comparison_table(
        groups, value_name="rating", against=against, samples=samples, confidence=confidence, seed=seed
    )
    return {
        "n_questions": len(ids),
        "significance": SIGNIFICANCE,
        "models": {model: _counts(scores) for model, scores in by_model.items()},
        "groups": {
            group: {"n_questions": len(members.get(group, ids)), "models": by_name} for group, by_name in table.items()
        },
    }


def _by_model(rows: Iterable[Json], questions: Mapping[int | str, Question]) -> dict[str, dict[Key, list[float]]]:
    by_model: dict[str, dict[Key, list[float]]] = {}
    judges: set[str] = set()
    for row in rows:
        try:
            key, score, judge = (row["question_id"], int(row["turn"])), float(row["score"]), row["judge"][0]
            scores = by_model.setdefault(str(row["model"]), defaultdict(list))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"a row is no judgment of FastChat's form (single-answer grading): {error}") from error
        if key[0] not in questions:
            raise DataError(f"there is a judgment of question {key[0]}, which is none of this benchmark's")
        judges.add(str(judge))
        scores[key].append(score)
    if not by_model:
        raise DataError("there are no judgments")
    if len(judges) > 1:
        raise DataError(f"the judgments are by several judges ({', '.join(sorted(judges))}): name one of them")
    return by_model


def _ratio(scores: Mapping[Key, Sequence[float]], members: Sequence[int | str], turns: Sequence[int]) -> Ratio:
    rated = [[s for turn in turns for s in scores.get((q, turn), ()) if in_range(s)] for q in members]
    return Ratio(
        numerator=np.array([sum(one) for one in rated], np.float64),
        denominator=np.array([len(o) for o in rated], float),
    )


def _counts(scores: Mapping[Key, Sequence[float]]) -> dict[str, Any]:
    every = [s for one in scores.values() for s in one]
    rated = [s for s in every if in_range(s)]
    unrated = len(every) - len(rated)
    repeated = [np.var(kept, ddof=1) for one in scores.values() if len(kept := [s for s in one if in_range(s)]) > 1]
    return {
        "judgments": len(every),
        "rated": len(rated),
        "unparsable": sum(s == UNPARSABLE for s in every),
        "off_scale": sum(s != UNPARSABLE and not in_range(s) for s in every),
        "fastchat_mean": float(np.mean(stated)) if (stated := [s for s in every if s != UNPARSABLE]) else None,
        "if_unrated": [(sum(rated) + unrated * bound) / len(every) for bound in RATING_RANGE],
        "judge_sd": float(np.sqrt(np.mean(repeated))) if repeated else None,
    }
