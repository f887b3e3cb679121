"""fusechat eval bpb MODEL... --data FILE"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fusechat.commands.json_out import JsonOut, tell


def bpb(
    models: Annotated[
        list[str], typer.Argument(help="directories or hub ids; the first is compared with", show_default=False)
    ],
    data: Annotated[
        str, typer.Option(help="dialogues: a file, a hub id, or a run, for those it held out", show_default=False)
    ],
    format: Annotated[
        Literal["auto", "sharegpt", "messages", "alpaca", "text"], typer.Option(help="layout of the data")
    ] = "auto",
    separator: Annotated[list[str] | None, typer.Option(help="what separates documents in a text file")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="cut running text into pieces of so many bytes")] = None,
    limit: Annotated[int | None, typer.Option(help="only so many dialogues", min=1)] = None,
    template: Annotated[
        str | None, typer.Option(help="own, plain, a .jinja file, or a model's; the run's, else own")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens; the run's, else 2048", min=2)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16; the run's, else auto")] = None,
    samples: Annotated[int, typer.Option(help="of the bootstrap", min=100, max=100_000)] = 2000,
    confidence: Annotated[float, typer.Option(help="of the intervals", min=0.5, max=0.999)] = 0.95,
    seed: Annotated[int, typer.Option(help="of the bootstrap", min=0, max=2**32 - 1)] = 0,
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
