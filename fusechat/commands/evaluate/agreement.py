"""fusechat eval agreement MODEL... --source SOURCE --data FILE"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fusechat.commands import data_options as reading
from fusechat.commands.evaluate import comparison_options as comparing
from fusechat.commands.json_out import JsonOut, tell


def agreement(
    models: comparing.Models,
    source: Annotated[list[str], typer.Option(help="a source's directory or hub id; repeatable", show_default=False)],
    data: comparing.HeldOut,
    format: reading.Format = "auto",
    separator: reading.Separator = None,
    max_bytes: reading.MaxBytes = None,
    limit: comparing.Limit = None,
    template: Annotated[str, typer.Option(help="own, plain, a .jinja file, or a model's")] = "own",
    max_length: Annotated[int, typer.Option(help="tokens", min=2)] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    top_k: Annotated[int, typer.Option(help="candidates compared", min=1)] = 10,
    samples: comparing.Samples = 2000,
    confidence: comparing.Confidence = 0.95,
    seed: comparing.Seed = 0,
    json_out: JsonOut = None,
) -> None:
    """How far models predict what sources predict, where both stand before the same text."""
    from fusechat.commands.evaluate.held_out import held_out
    from fusechat.commands.evaluate.names import model_names
    from fusechat.commands.progress import terminal_reporter
    from fusechat.evaluate.agreement import agreement as compare

    dialogues = held_out(data, format=format, separator=separator, max_bytes=max_bytes, limit=limit)
    with terminal_reporter() as reporter:
        results = compare(
            model_names(models),
            model_names(source),
            dialogues,
            top_k=top_k,
            template=template,
            max_length_tokens=max_length,
            dtype=dtype,
            samples=samples,
            confidence=confidence,
            seed=seed,
            progress=reporter.stage("agreement", "models"),
        )
        reporter.done("agreement", f"{len(models)} models, {len(source)} sources")
    tell(results, json_out, _print)


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fusechat.commands.results import with_interval

    console = Console()
    headings = {"top1": "top-1", "top1_prefix": "prefix", "topk": f"top-{results['top_k']}", "kl_bits": "KL, bits"}
    for source, content in results["sources"].items():
        overall = content["groups"]["overall"]
        console.print(
            f"[bold]agreement with {escape(source)}[/bold], {overall['n_dialogues']} dialogues", highlight=False
        )
        table = Table(pad_edge=False, box=None, padding=(0, 0, 0, 1))
        table.add_column("", overflow="fold")
        for heading in ("rows shared", *headings.values()):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, measures in overall["models"].items():
            cells = [with_interval(measures[key]["value"], measures[key]["p_holm"]) for key in headings]
            table.add_row(name, f"{content['shared_share'][name]:.1%}", *cells)
        console.print(table, markup=False)
    console.print(
        "±: half the bootstrap interval over dialogues; *: differs from the first model,\n"
        "p < 0.05, paired (Holm). Lower KL is nearer to the source. JSON: by category.",
        highlight=False,
        style="dim",
    )
