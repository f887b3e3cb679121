"""fusechat eval judge ANSWERS... --judge-url URL --judge-model NAME; fusechat eval ratings JUDGMENTS..."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusechat.commands.evaluate import comparison_options as comparing
from fusechat.commands.evaluate import endpoint_options as options
from fusechat.commands.json_out import JsonOut, tell

Questions = Annotated[Path, typer.Option(help="MT-Bench's question.jsonl", show_default=False)]


def judge(
    answers: Annotated[
        list[Path], typer.Argument(help="FastChat answer files, one a model, named after it", show_default=False)
    ],
    questions: Questions,
    prompts: Annotated[Path, typer.Option(help="MT-Bench's judge_prompts.jsonl", show_default=False)],
    references: Annotated[Path, typer.Option(help="a file of its reference_answer/", show_default=False)],
    judge_url: options.JudgeUrl,
    judge_model: options.JudgeModel,
    out: Annotated[Path, typer.Option(help="file of judgments, which grows by a line each")] = Path("judgments.jsonl"),
    repeats: Annotated[int, typer.Option(help="judgments per answer", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="of the judge", min=0.0)] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="of a judgment", min=1)] = 2048,
    concurrency: options.Concurrency = 8,
    requests_per_minute: options.RequestsPerMinute = None,
    timeout: options.Timeout = 300.0,
    retries: options.Retries = 5,
    api_key_env: options.ApiKeyEnv = options.KEY_NAME,
    request_field: options.RequestFields = None,
    against: comparing.Against = None,
    confidence: comparing.Confidence = 0.95,
    json_out: JsonOut = None,
) -> None:
    """MT-Bench's single-answer grading of answers by a judge; run again, it goes on where it stopped."""
    from fusechat.commands.evaluate.names import file_names, require_among
    from fusechat.commands.progress import terminal_reporter
    from fusechat.evaluate.judge import Sampling, judge_answers

    endpoint = options.endpoint(
        judge_url,
        judge_model,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        timeout=timeout,
        retries=retries,
        api_key_env=api_key_env,
        fields=request_field,
    )
    files = file_names(answers)
    require_among(against, files)
    with terminal_reporter() as reporter:
        rows = judge_answers(
            files,
            questions=questions,
            prompts=prompts,
            references=references,
            judgments=out,
            endpoint=endpoint,
            repeats=repeats,
            sampling=Sampling(temperature=temperature, max_tokens=max_tokens),
            progress=reporter.stage("judge", "judgments"),
        )
        reporter.done("judge", f"{len(rows)} judgments by {judge_model} in {out}")
    _report(rows, questions, against, confidence, json_out)


def ratings(
    judgments: Annotated[list[Path], typer.Argument(help="FastChat judgment files", show_default=False)],
    questions: Questions,
    judge_model: Annotated[str | None, typer.Option(help="only this judge's")] = None,
    against: comparing.Against = None,
    confidence: comparing.Confidence = 0.95,
    json_out: JsonOut = None,
) -> None:
    """Mean ratings of judgments that are there already, FastChat's own files among them."""
    from fusechat.evaluate.journal import read_rows

    rows = [row for path in judgments for row in read_rows(path)]
    if judge_model is not None:
        rows = [row for row in rows if row.get("judge", [None])[0] == judge_model]
    _report(rows, questions, against, confidence, json_out)


def _report(
    rows: list[dict[str, Any]], questions: Path, against: str | None, confidence: float, json_out: Path | None
) -> None:
    from fusechat.commands.evaluate.ratings_view import print_ratings
    from fusechat.evaluate.mtbench import load_questions
    from fusechat.evaluate.ratings import ratings_table

    results = ratings_table(rows, load_questions(questions), against=against, confidence=confidence)
    tell(results, json_out, print_ratings)
