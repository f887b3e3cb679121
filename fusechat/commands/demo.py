"""fusechat demo [--out DIR] [--seed N] [--backend hf|vllm]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def demo(
    out: Annotated[Path, typer.Option(help="folder of everything the demo makes")] = Path("fusechat-demo"),
    seed: Annotated[int, typer.Option(help="of the dialogues, the models and the training", min=0, max=2**32 - 1)] = 0,
    backend: Annotated[Literal["hf", "vllm"], typer.Option(help="what extracts: transformers or vLLM")] = "hf",
) -> None:
    """Fuse three small chat models made on the spot, and check that the fusion did what it should."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fusechat.artifact import write_json
    from fusechat.commands.progress import terminal_reporter
    from fusechat.commands.results import print_results
    from fusechat.demo.fusion import fuse_demo

    out.mkdir(parents=True, exist_ok=True)
    with terminal_reporter() as reporter:
        outcome = fuse_demo(out, seed=seed, backend=backend, reporter=reporter)
    write_json(out / "results.json", outcome.results)
    print_results(outcome.results)
    console = Console()
    console.print()
    for check in outcome.checks:
        verdict = "[green]holds[/green]" if check.holds else "[red]FAILS[/red]"
        console.print(
            f"{verdict}  {check.claim}: {check.value:+.3f} \\[{check.low:+.3f}, {check.high:+.3f}]", highlight=False
        )
    console.print(f"\n[bold]{escape(outcome.prompt)}[/bold]", highlight=False)
    answers = Table.grid(padding=(0, 2))
    for name, text in outcome.answers.items():
        answers.add_row(f"  {name}", escape(text))
    console.print(answers, highlight=False)
    places = Table.grid(padding=(0, 2))
    places.add_column()
    places.add_column(overflow="fold")
    for what, place in (
        ("what came out, to look at", out / "run" / "report.html"),
        ("the fused model", out / "run" / "merged"),
        ("settings, with their reasons", out / "demo.yaml"),
        ("everything", out),
    ):
        places.add_row(what, escape(str(place)))
    console.print()
    console.print(places, highlight=False)
    if not all(check.holds for check in outcome.checks):
        console.print("[red]the fusion did not do what it should: see the checks above[/red]")
        raise typer.Exit(1)
