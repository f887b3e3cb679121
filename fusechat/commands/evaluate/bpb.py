"""fusechat eval bpb MODEL... --data FILE"""

from __future__ import annotations

from typing import Annotated

import typer

from fusechat.commands import data_options as reading
from fusechat.commands.evaluate import comparison_options as comparing
from fusechat.commands.json_out import JsonOut, tell


def bpb(
    models: comparing.Models,
    data: comparing.HeldOut,
    format: reading.Format = "auto",
    separator: reading.Separator = None,
    max_bytes: reading.MaxBytes = None,
    limit: comparing.Limit = None,
    template: Annotated[
        str | None, typer.Option(help="own, plain, a .jinja file, or a model's; the run's, else own")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens; the run's, else 2048", min=2)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16; the run's, else auto")] = None,
    samples: comparing.Samples = 2000,
    confidence: comparing.Confidence = 0.95,
    seed: comparing.Seed = 0,
    json_out: JsonOut = None,
) -> None:
    """Bits per byte of models on held-out dialogues, by category, with paired intervals and tests.

    With a run as --data its sources are scored as the run scores them, and all other models as its pivot.
    """
    from fusechat.commands.evaluate.held_out import held_out, run_config
    from fusechat.commands.evaluate.names import model_names
    from fusechat.commands.progress import terminal_reporter
    from fusechat.commands.results import print_results
    from fusechat.evaluate.bpb import results_table, score_models
    from fusechat.evaluate.run_scores import scoring_of

    names = model_names(models)
    dialogues = held_out(data, format=format, separator=separator, max_bytes=max_bytes, limit=limit)
    run = run_config(data)
    given = {"template": template, "max_length_tokens": max_length, "dtype": dtype}
    asked = {key: value for key, value in given.items() if value is not None}
    options = {name: (scoring_of(run, model) if run else {}) | asked for name, model in names.items()}
    with terminal_reporter() as reporter:
        advance = reporter.stage("evaluate", "models")
        scores = score_models(names, dialogues, options=options, progress=advance)
        reporter.done("evaluate", f"{len(names)} models")
    results = results_table(
        scores, dialogues, against=next(iter(names)), samples=samples, confidence=confidence, seed=seed
    )
    tell(results, json_out, print_results)
