"""AlpacaEval 2.0 through the alpaca_eval package: its prompt, random order, parser and win rates are used as they are.

What this adds: the judge is any OpenAI-compatible server, its replies are kept in an append-only file, everything is
local (reference outputs and df_gamed.csv are the user's files), and nothing is written into the package, whose own
entry point keeps annotations, leaderboards and weights in site-packages.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.artifact import Json, read_json
from fusechat.errors import DataError, FormatError, FusechatError, MismatchError
from fusechat.evaluate.endpoint import Client, Endpoint, for_each
from fusechat.evaluate.journal import Journal, open_journal

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"


def load_instructions(path: Path) -> list[Json]:
    """Return the rows of any of alpaca_eval's files that has `instruction`s; raises FormatError."""
    return _rows(path, ("instruction",), "give alpaca_eval.json or any model_outputs.json")


def load_outputs(path: Path) -> list[Json]:
    """Return the rows of an alpaca_eval model_outputs.json; raises FormatError."""
    return _rows(path, ("instruction", "output"), "`fusechat eval answers --benchmark alpaca` writes such a file")


def load_annotations(path: Path) -> list[Json]:
    """Return the rows of an alpaca_eval annotations.json; raises FormatError."""
    keys = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")
    return _rows(path, keys, "give an annotations.json of alpaca_eval")


def _rows(path: Path, keys: Sequence[str], mend: str) -> list[Json]:
    rows = read_json(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise FormatError(f"{path} is no list of JSON objects: {mend}")
    for n, row in enumerate(rows):
        if missing := [key for key in keys if key not in row]:
            raise FormatError(f"{path} entry {n} lacks {', '.join(missing)}: {mend}")
    return rows


def positions(rows: Sequence[Json], reference: Sequence[Json], name: str) -> list[int]:
    """Return the place of each row's instruction among the reference's; raises DataError when they do not match.

    Places matter beyond pairing: the length-controlled model knows an instruction by its place in the official list.
    """
    place = {row["instruction"]: n for n, row in enumerate(reference)}
    unknown = sum(row["instruction"] not in place for row in rows)
    if unknown:
        raise DataError(
            f"{unknown} of {len(rows)} instructions of {name} are not among the {len(reference)} reference outputs: "
            "is it of another benchmark?"
        )
    if len({row["instruction"] for row in rows}) < len(rows):
        raise DataError(f"{name} has an instruction twice")
    if len(rows) < len(reference):
        raise DataError(f"{name} lacks {len(reference) - len(rows)} of {len(reference)} instructions: finish it first")
    return [place[row["instruction"]] for row in rows]


def annotate(
    outputs: Path,
    *,
    reference: Path,
    replies: Path,
    endpoint: Endpoint,
    progress: Callable[[int, int], None] | None = None,
) -> list[Json]:
    """Have a judge prefer between a model's outputs and the reference's and return alpaca_eval's annotations.

    The annotator is the package's weighted_alpaca_eval_gpt4_turbo, with the judge in GPT-4's place. Raises DataError
    or FormatError for files that do not fit together, EndpointError when the judge cannot be worked with, DataError
    when none of its replies has a probability of `m` or `M`; the replies had so far are in `replies` in any case.
    """
    alpaca_eval = package()
    rows, base = load_outputs(outputs), load_outputs(reference)
    order = positions(rows, base, str(outputs))
    name = str(rows[0].get("generator", outputs.stem))
    against = [{**base[n], "generator": base[n].get("generator", reference.stem)} for n in order]
    own = [{"instruction": r["instruction"], "output": r["output"], "generator": name} for r in rows]
    with open_journal(replies) as journal, quietly():
        annotator = alpaca_eval.annotators.PairwiseAnnotator(annotators_config=ANNOTATOR, caching_path=None)
        (single,) = annotator.annotators.values()
        single.fn_completions = _completions(journal, endpoint, progress)
        annotations = annotator.annotate_head2head(outputs_1=against, outputs_2=own, chunksize=None)
    for row in annotations:
        row["judge"] = endpoint.model
        row["preference"] = None if preference(row) is None else float(row["preference"])
    if all(row["preference"] is None for row in annotations):
        raise DataError(
            f"no reply of {endpoint.model} has a probability of `m` or `M` among its top_logprobs: "
            "AlpacaEval 2.0 needs a judge that returns log-probabilities and follows its format"
        )
    place = {row["instruction"]: n for n, row in enumerate(base)}
    return sorted(annotations, key=lambda row: place[row["instruction"]])


def _completions(
    journal: Journal, endpoint: Endpoint, progress: Callable[[int, int], None] | None
) -> Callable[..., dict[str, list[Any]]]:
    """Return what the package calls for completions of its ChatML prompts: from the journal, else from the judge."""

    def completions(prompts: Sequence[str], **options: Any) -> dict[str, list[Any]]:
        known = _replies(journal, endpoint.model)
        waiting = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        sampling = {key: options[key] for key in ("max_tokens", "temperature", "logprobs", "top_logprobs")}
        if waiting:
            client = Client(endpoint=endpoint)
            client.check()

            def ask(prompt: str) -> None:
                choice = client.chat(package().utils.prompt_to_chatml(prompt), **sampling)
                known[prompt] = choice
                journal.append({"judge": endpoint.model, "prompt": prompt, "choice": choice, "tstamp": time.time()})

            failures = for_each(waiting, ask, concurrency=endpoint.concurrency, progress=progress)
            if failures:
                raise FusechatError(
                    f"{len(failures)} of {len(waiting)} preferences could not be had (the last: {failures[-1]}); the "
                    f"others are in {journal.path}: run the same command again for the rest"
                )
        choices = [known[prompt] for prompt in prompts]
        return {
            "completions": [choice["message"]["content"] for choice in choices],
            "completions_all": choices,
            "price_per_example": [0.0] * len(choices),
            "time_per_example": [0.0] * len(choices),
        }

    return completions


def _replies(journal: Journal, judge: str) -> dict[str, Json]:
    try:
        return {row["prompt"]: row["choice"] for row in journal.rows if row["judge"] == judge}
    except KeyError as error:
        raise MismatchError(f"{journal.path} is no file of AlpacaEval replies: choose another one") from error


def preference(row: Json) -> float | None:
    """Return an annotation's preference, from 1 (the reference) to 2 (the model), None when the judge stated none."""
    value = row["preference"]
    return None if value is None or not np.isfinite(value) or value < 0 else float(value)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the package's log and its libraries' warnings off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def package() -> Any:
    """Return the module alpaca_eval; raises FusechatError when it is not installed."""
    try:
        with quietly():
            import alpaca_eval
            import alpaca_eval.metrics.glm_winrate
    except ImportError as error:
        raise FusechatError(
            f"AlpacaEval needs the package alpaca_eval ({error}): pip install 'fusechat[alpaca]'"
        ) from error
    return alpaca_eval
