"""fusechat compare RUN RUN ... [--out compare.html]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="the folders of two or more runs", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="also write the comparison as one HTML page")] = None,
) -> None:
    """Put several runs side by side: what each came to, and in which settings they differ."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fusechat.artifact import atomic_write
    from fusechat.report.compare import compare as compare_runs
    from fusechat.report.compare import compare_page
    from fusechat.report.words import duration, number, percent, signed

    compared = compare_runs(runs)
    console = Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for column in ("merged", "control", "difference", "aligned", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, run in compared["runs"].items():
        cells = ["not evaluated", "", ""]
        if not run["missing"]:
            value, low, high = run["difference"]
            cells = [number(run["bits_per_byte"][0]), number(run["control"])]
            cells.append(f"{signed(value)} [{signed(low)}, {signed(high)}]")
        shares = [share for share in run["coverage"].values() if share is not None]
        aligned = f"≥ {percent(min(shares))}" if shares else ""
        table.add_row(*map(escape, [name, *cells, aligned, duration(run["seconds"])]))
    console.print("[bold]held-out bits per byte[/bold] of the merged model, lower is better")
    console.print(table)
    for sentence in compared["conclusions"]:
        console.print(escape(sentence), highlight=False)
    for warning in compared["warnings"]:
        console.print(escape(warning), style="yellow")
    settings = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    settings.add_column("setting")
    for name in compared["runs"]:
        settings.add_column(escape(name), overflow="fold")
    for key, values in compared["settings"].items():
        settings.add_row(escape(key), *(escape("–" if value is None else str(value)) for value in values.values()))
    console.print("\n[bold]settings that differ[/bold]" if compared["settings"] else "\nno setting differs")
    if compared["settings"]:
        console.print(settings)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as partial:
            partial.write_text(compare_page(compared), encoding="utf-8")
        console.print(f"\n{escape(str(out))}", highlight=False)
