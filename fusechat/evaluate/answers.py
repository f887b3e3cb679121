"""A model's answers to a benchmark, in FastChat's or alpaca_eval's own file format, resumable.

Answers are appended, as they are made, to a file of FastChat's rows; for AlpacaEval its list of outputs is written
from it when all are there. Questions are asked in blocks that do not depend on what is there already, so a resumed run
samples what an uninterrupted one would have.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fusechat.artifact import Json, atomic_write, sha256_json, write_json
from fusechat.errors import FusechatError, MismatchError
from fusechat.evaluate.benchmark import ALPACA, Benchmark
from fusechat.evaluate.endpoint import for_each
from fusechat.evaluate.journal import Journal, open_journal
from fusechat.evaluate.mtbench import Question

TOO_LONG = "too_long"
ERROR = "ERROR"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A dialogue that ends with the user's turn, and how its answer is sampled."""

    messages: tuple[Json, ...]
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer and why it ended: "stop", "length" (cut at max_tokens), or "too_long" (the prompt does not fit)."""

    text: str
    finish: str


class Writer(Protocol):
    """What answers: `block` questions at a call, `concurrency` calls at a time."""

    block: int
    concurrency: int

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Return a reply to every request, in order."""
        ...


def answer_benchmark(
    benchmark: Benchmark,
    writer: Callable[[], Writer],
    out: Path,
    *,
    model_id: str,
    answerer: Json,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Counter[str]:
    """Answer what is not yet answered and return how often answers ended why.

    `out` is a .jsonl for MT-Bench's form, a .json for AlpacaEval's, beside which the rows are kept. `answerer` is all
    that sets the answers beside the requests, as JSON (`local_answerer` for a model that is here): each row keeps its
    hash. `writer()` is called only when something is left to do. A prompt that does not fit the model's context is
    answered "ERROR", as FastChat does. Raises MismatchError when `out` holds answers of another model, benchmark or
    setting, and FusechatError when some answers could not be had.
    """
    rows_path = out if benchmark.form != ALPACA else out.with_name(out.name + "l")
    if rows_path.suffix != ".jsonl":
        raise FusechatError(f"--out {out} should end in {'.json' if benchmark.form == ALPACA else '.jsonl'}")
    limit = benchmark.max_tokens if max_tokens is None else max_tokens
    asked = {
        q.id: Request(
            messages=tuple({"role": "user", "content": turn} for turn in q.turns),
            temperature=benchmark.temperature(q) if temperature is None else temperature,
            max_tokens=limit,
            seed=seed + n,
        )
        for n, q in enumerate(benchmark.questions)
    }
    hashes = {question: _asked_sha256(request, answerer) for question, request in asked.items()}
    with open_journal(rows_path) as journal:
        done = _already(journal, hashes, model_id)
        if len(done) < len(asked):
            failures = _answer_rest(benchmark.questions, asked, hashes, done, writer(), journal, model_id, progress)
            if failures:
                raise FusechatError(
                    f"{len(failures)} questions could not be answered (the last: {failures[-1]}); the other answers "
                    f"are in {rows_path}: run the same command again for the rest"
                )
        rows = {row["question_id"]: row for row in journal.rows}
        ordered = [rows[q.id] for q in benchmark.questions]
        in_order = journal.rows == ordered
    if benchmark.form == ALPACA:
        _write_outputs(out, benchmark, ordered, model_id)
    elif not in_order:
        with atomic_write(out) as partial:
            partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered), encoding="utf-8")
    return Counter(finish for row in ordered for finish in row["choices"][0]["finish"])


def local_answerer(model: str, template: str, **settings: Any) -> Json:
    """Return what sets the answers of a model that is here: hashes of its weights and template, and `settings`.

    Every byte of the weights is read. Raises DataError for a model or a template that is not there.
    """
    from fusechat.checkpoint import checkpoint_sha256, resolve_model
    from fusechat.template import load_template
    from fusechat.tokenizer import load_tokenizer

    directory = resolve_model(model)
    return {
        "model_sha256": checkpoint_sha256(directory),
        "template_sha256": load_template(load_tokenizer(directory), template).sha256,
        **settings,
    }


def _asked_sha256(request: Request, answerer: Json) -> str:
    return sha256_json([list(request.messages), request.temperature, request.max_tokens, request.seed, answerer])


def _already(journal: Journal, hashes: dict[int | str, str], model_id: str) -> set[int | str]:
    done = set()
    for row in journal.rows:
        expected = hashes.get(row.get("question_id", ""))
        if expected is None or row.get("model_id") != model_id or row.get("asked_sha256") != expected:
            raise MismatchError(
                f"{journal.path} holds an answer of {row.get('model_id')} to question {row.get('question_id')}, which "
                f"is not what {model_id} is asked here (weights or server, template, dtype, batch size, question, "
                "temperature, length, seed): choose another --out"
            )
        done.add(row["question_id"])
    return done


def _answer_rest(
    questions: Sequence[Question],
    asked: dict[int | str, Request],
    hashes: dict[int | str, str],
    done: set[int | str],
    writer: Writer,
    journal: Journal,
    model_id: str,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    blocks = [questions[i : i + writer.block] for i in range(0, len(questions), writer.block)]
    waiting = [block for block in blocks if any(q.id not in done for q in block)]

    def work(block: Sequence[Question]) -> None:
        replies = _converse([asked[q.id] for q in block], writer)
        rows = [
            {
                "question_id": q.id,
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": [r.text for r in turns], "finish": [r.finish for r in turns]}],
                "tstamp": time.time(),
                "asked_sha256": hashes[q.id],
            }
            for q, turns in zip(block, replies, strict=True)
        ]
        journal.append(*(row for row in rows if row["question_id"] not in done))

    return for_each(waiting, work, concurrency=writer.concurrency, progress=progress)


def _converse(requests: Sequence[Request], writer: Writer) -> list[list[Reply]]:
    """Return every turn's reply: each turn sees the model's own answers to those before it."""
    replies: list[list[Reply]] = [[] for _ in requests]
    for turn in range(max(len(request.messages) for request in requests)):
        asking = [n for n, request in enumerate(requests) if turn < len(request.messages)]
        calls = []
        for n in asking:
            messages: list[Json] = []
            for user, reply in zip(requests[n].messages, replies[n]):
                messages += [user, {"role": "assistant", "content": reply.text}]
            one = requests[n]
            calls.append(
                Request(
                    messages=(*messages, one.messages[turn]),
                    temperature=one.temperature,
                    max_tokens=one.max_tokens,
                    seed=one.seed,
                )
            )
        for n, reply in zip(asking, writer(calls), strict=True):
            replies[n].append(reply)
    return replies


def _write_outputs(out: Path, benchmark: Benchmark, rows: Sequence[Json], model_id: str) -> None:
    outputs = [
        {
            **({"dataset": instruction["dataset"]} if "dataset" in instruction else {}),
            "instruction": instruction["instruction"],
            "output": row["choices"][0]["turns"][0],
            "generator": model_id,
        }
        for instruction, row in zip(benchmark.instructions, rows, strict=True)
    ]
    write_json(out, outputs)
