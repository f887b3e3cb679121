"""fusechat eval bpb MODEL... --data FILE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


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
    template: Annotated[str, typer.Option(help="own, plain, a .jinja file, or a model's")] = "own",
    max_length: Annotated[int, typer.Option(help="tokens", min=2)] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    samples: Annotated[int, typer.Option(help="of the bootstrap", min=100)] = 2000,
    confidence: Annotated[float, typer.Option(help="of the intervals", min=0.5, max=0.999)] = 0.95,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the table here")] = None,
) -> None:
    """Bits per byte of models on held-out dialogues, by category, with paired intervals and tests."""
    from fusechat.artifact import write_json
    from fusechat.commands.evaluate.held_out import held_out
    from fusechat.commands.evaluate.names import model_names
    from fusechat.commands.progress import terminal_reporter
    from fusechat.commands.results import print_results
    from fusechat.evaluate.bpb import results_table, score_models

    names = model_names(models)
    dialogues = held_out(data, format=format, separator=separator, max_bytes=max_bytes, limit=limit)
    with terminal_reporter() as reporter:
        advance = reporter.stage("evaluate", "models")
        scores = score_models(
            names,
            dialogues,
            templates=dict.fromkeys(names, template),
            max_length_tokens=max_length,
            dtype=dtype,
            progress=advance,
        )
        reporter.done("evaluate", f"{len(names)} models")
    results = results_table(
        scores, dialogues, against=next(iter(names)), samples=samples, confidence=confidence, seed=seed
    )
    if json_out is not None:
        write_json(json_out, results)
    print_results(results)
