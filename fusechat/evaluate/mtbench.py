"""MT-Bench's files and protocol: questions, answers, references, judge prompts, and what a judgment's rating is.

The formats are those of FastChat's llm_judge (question.jsonl, model_answer/*.jsonl, reference_answer/*.jsonl,
judge_prompts.jsonl, model_judgment/*.jsonl); nothing of its text is part of this package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusechat.artifact import Json
from fusechat.errors import DataError, FormatError
from fusechat.evaluate.journal import read_rows

WITH_REFERENCE = ("math", "reasoning", "coding")
TURNS = (1, 2)
UNPARSABLE = -1
RATING_RANGE = (1, 10)

_RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_PROMPTS = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question of a benchmark of dialogues: its id, its category, and the user's turns."""

    id: int | str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """How a judge is asked: a system prompt, and a template of the user's message."""

    name: str
    system: str
    template: str


def parse_rating(judgment: str) -> float:
    """Return the rating a judge's text states, −1 when it states none.

    FastChat's rule: the first number in double brackets, else the first in single ones. The number may lie outside the
    scale, which `in_range` tells.
    """
    for pattern in _RATING:
        if found := pattern.search(judgment):
            value = float(found.group(1))
            return int(value) if value.is_integer() else value
    return UNPARSABLE


def in_range(score: float) -> bool:
    """Whether a rating lies on the scale from 1 to 10."""
    return RATING_RANGE[0] <= score <= RATING_RANGE[1]


def load_questions(path: Path) -> dict[int | str, Question]:
    """Return the questions of a FastChat question.jsonl by id; raises FormatError."""
    questions: dict[int | str, Question] = {}
    for row in read_rows(path):
        turns = row.get("turns")
        if "question_id" not in row or not isinstance(turns, list) or not all(isinstance(t, str) for t in turns):
            raise FormatError(f"{path} holds no questions of MT-Bench's form: a row lacks question_id or turns")
        if row["question_id"] in questions:
            raise FormatError(f"{path} has question {row['question_id']} twice")
        questions[row["question_id"]] = Question(
            id=row["question_id"], category=str(row.get("category", "")), turns=tuple(turns)
        )
    if not questions:
        raise FormatError(f"{path} holds no questions")
    return questions


def load_answers(path: Path) -> dict[int | str, list[str]]:
    """Return the turns of the first choice by question of a FastChat model_answer file; raises FormatError."""
    answers: dict[int | str, list[str]] = {}
    for row in read_rows(path):
        try:
            answers[row["question_id"]] = [str(turn) for turn in row["choices"][0]["turns"]]
        except (KeyError, IndexError, TypeError) as error:
            raise FormatError(
                f"{path} holds no answers of FastChat's form (question_id, choices[0].turns): "
                "`fusechat eval answers --benchmark mt-bench` writes it"
            ) from error
    return answers


def check_answers(
    name: str, answers: Mapping[int | str, Sequence[str]], questions: Mapping[int | str, Question]
) -> None:
    """Raise DataError when answers are not those of exactly these questions, turn by turn."""
    missing = [q for q in questions if q not in answers]
    foreign = [a for a in answers if a not in questions]
    if len(missing) == len(questions):
        raise DataError(f"{name} answers none of the {len(questions)} questions: is it of another benchmark?")
    if foreign:
        raise DataError(f"{name} answers {_listed(foreign)}, no question of this benchmark: is it of another one?")
    if missing:
        raise DataError(f"{name} lacks answers to {_listed(missing)}: finish it with `fusechat eval answers`")
    for q, question in questions.items():
        if len(answers[q]) < min(len(question.turns), len(TURNS)):
            raise DataError(f"{name} answers {len(answers[q])} of {len(question.turns)} turns of question {q}")


def check_references(
    path: Path, references: Mapping[int | str, Sequence[str]], questions: Mapping[int | str, Question]
) -> None:
    """Raise DataError when a question that is judged with a reference answer has none, or not for both turns."""
    needed = [q for q in questions.values() if q.category in WITH_REFERENCE]
    missing = [q.id for q in needed if len(references.get(q.id, ())) < min(len(q.turns), len(TURNS))]
    if missing:
        raise DataError(
            f"{path} lacks the reference answers to {_listed(missing)} ({', '.join(WITH_REFERENCE)} are judged with "
            "them): give the file of reference_answer/ that is complete"
        )


def _listed(ids: Sequence[int | str]) -> str:
    shown = ", ".join(str(i) for i in ids[:5])
    return f"question{'s' * (len(ids) > 1)} {shown}" + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def load_prompts(path: Path) -> dict[str, Prompt]:
    """Return the four prompts of single-answer grading by name; raises FormatError when one is missing."""
    prompts = {}
    for row in read_rows(path):
        if row.get("name") in _PROMPTS.values():
            try:
                prompts[row["name"]] = Prompt(
                    name=row["name"], system=str(row["system_prompt"]), template=str(row["prompt_template"])
                )
            except KeyError as error:
                raise FormatError(f"{path}: prompt {row['name']} lacks {error}") from error
    missing = set(_PROMPTS.values()) - prompts.keys()
    if missing:
        raise FormatError(
            f"{path} lacks the prompts {', '.join(sorted(missing))}: give FastChat's llm_judge/data/judge_prompts.jsonl"
        )
    return prompts


def judge_messages(
    prompts: Mapping[str, Prompt],
    question: Question,
    answer: Sequence[str],
    reference: Sequence[str] | None,
    turn: int,
) -> tuple[str, list[Json]]:
    """Return the name of the prompt that judges a turn, and the messages to send.

    The first turn is judged alone, the second with the whole conversation before it.
    """
    prompt = prompts[_PROMPTS[turn, question.category in WITH_REFERENCE]]
    fields = {"question": question.turns[0], "answer": answer[0]} if turn == 1 else {}
    if turn == 2:
        fields = {f"question_{n}": question.turns[n - 1] for n in TURNS}
        fields |= {f"answer_{n}": answer[n - 1] for n in TURNS}
    fields |= {f"ref_answer_{n}": text for n, text in enumerate(reference or (), 1)}
    try:
        user = prompt.template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise FormatError(
            f"the template of prompt {prompt.name} is not MT-Bench's: {error} in it is unknown"
        ) from error
    return prompt.name, [{"role": "system", "content": prompt.system}, {"role": "user", "content": user}]
