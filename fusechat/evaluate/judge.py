"""MT-Bench's single-answer grading by any OpenAI-compatible judge, one row per judgment in an append-only file.

The rows are FastChat's (model_judgment/*_single.jsonl), so its own tools read them. A judgment that is in the file for
the same prompt and judge is never asked for again; repeated judging is more rows of the same prompt.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusechat.artifact import Json
from fusechat.errors import FusechatError, MismatchError
from fusechat.evaluate.endpoint import Client, Endpoint, for_each
from fusechat.evaluate.journal import Journal, open_journal
from fusechat.evaluate.mtbench import (
    TURNS,
    Question,
    check_answers,
    check_references,
    judge_messages,
    load_answers,
    load_prompts,
    load_questions,
    parse_rating,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the judge writes; MT-Bench's own values."""

    temperature: float = 0.0
    max_tokens: int = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    model: str
    question: Question
    turn: int
    prompt_name: str
    messages: list[Json]

    def row(self, judge: str, sampling: Sampling, judgment: str) -> Json:
        return {
            "question_id": self.question.id,
            "model": self.model,
            "judge": [judge, self.prompt_name],
            "user_prompt": self.messages[1]["content"],
            "judgment": judgment,
            "score": parse_rating(judgment),
            "turn": self.turn,
            "tstamp": time.time(),
            "temperature": sampling.temperature,
        }


def judge_answers(
    answers: Mapping[str, Path],
    *,
    questions: Path,
    prompts: Path,
    references: Path,
    judgments: Path,
    endpoint: Endpoint,
    repeats: int = 1,
    sampling: Sampling = Sampling(),
    progress: Callable[[int, int], None] | None = None,
) -> list[Json]:
    """Have every turn of every model's answers judged `repeats` times and return this judge's rows of these models.

    Everything is checked before anything is asked. Raises DataError or FormatError for files that do not fit together,
    MismatchError when `judgments` holds judgments of other answers, EndpointError when the judge cannot be worked
    with, FusechatError when some judgments could not be had; what could be had is in `judgments` in any case.
    """
    tasks = _tasks(answers, questions, prompts, references)
    with open_journal(judgments) as journal:
        waiting = _not_yet_judged(journal, tasks, endpoint.model, repeats, sampling)
        if waiting:
            client = Client(endpoint=endpoint)
            client.check()

            def ask(task: _Task) -> None:
                choice = client.chat(task.messages, temperature=sampling.temperature, max_tokens=sampling.max_tokens)
                journal.append(task.row(endpoint.model, sampling, choice["message"]["content"]))

            failures = for_each(waiting, ask, concurrency=endpoint.concurrency, progress=progress)
            if failures:
                raise FusechatError(
                    f"{len(failures)} of {len(waiting)} judgments could not be had (the last: {failures[-1]}); the "
                    f"others are in {judgments}: run the same command again for the rest"
                )
        return [row for row in journal.rows if row["judge"][0] == endpoint.model and row["model"] in answers]


def _tasks(answers: Mapping[str, Path], questions: Path, prompts: Path, references: Path) -> list[_Task]:
    asked, texts, right = load_questions(questions), load_prompts(prompts), load_answers(references)
    check_references(references, right, asked)
    tasks = []
    for model, path in answers.items():
        given = load_answers(path)
        check_answers(str(path), given, asked)
        for question in asked.values():
            for turn in TURNS[: len(question.turns)]:
                name, messages = judge_messages(texts, question, given[question.id], right.get(question.id), turn)
                tasks.append(_Task(model=model, question=question, turn=turn, prompt_name=name, messages=messages))
    return tasks


def _not_yet_judged(
    journal: Journal, tasks: Sequence[_Task], judge: str, repeats: int, sampling: Sampling
) -> list[_Task]:
    wanted = {(task.model, task.question.id, task.turn): task.messages[1]["content"] for task in tasks}
    have: Counter[tuple[str, int | str, int]] = Counter()
    for row in journal.rows:
        try:
            key, by, prompt = (row["model"], row["question_id"], row["turn"]), row["judge"][0], row["user_prompt"]
        except (KeyError, IndexError, TypeError) as error:
            raise MismatchError(f"{journal.path} is no file of judgments: choose another one") from error
        if by != judge or key not in wanted:
            continue
        if prompt != wanted[key] or row.get("temperature", sampling.temperature) != sampling.temperature:
            raise MismatchError(
                f"{journal.path} holds a judgment of {row['model']} on question {row['question_id']}, turn "
                f"{row['turn']}, with another answer, prompt, reference or temperature: choose another file"
            )
        have[key] += 1
    return [task for task in tasks for _ in range(repeats - have[task.model, task.question.id, task.turn])]
