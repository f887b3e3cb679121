"""fusechat inspect PATH"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    path: Annotated[Path, typer.Argument(help="a store, a target, a merged model or results", show_default=False)],
    dialogue: Annotated[int | None, typer.Option(help="which dialogue of a store to show; the first if absent")] = None,
    rows: Annotated[int, typer.Option(help="how many rows to show", min=1)] = 12,
    verify: Annotated[bool, typer.Option(help="check every shard's checksum")] = True,
) -> None:
    """Say what an artefact is, with its manifest and a readable sample."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fusechat.align import read_coverage
    from fusechat.commands.coverage import print_coverage
    from fusechat.commands.results import print_results
    from fusechat.inspect import describe, sample_rows, summary
    from fusechat.store import ALIGNED_FORMAT, TOPK_FORMAT, Store

    kind, manifest = describe(path)
    console = Console()
    console.print(f"[bold]{kind}[/bold]  {escape(str(path))}", highlight=False, soft_wrap=True)
    facts = Table(box=None, show_header=False, pad_edge=False)
    if kind == ALIGNED_FORMAT:
        manifest = {key: value for key, value in manifest.items() if key != "coverage"}
    for name, text in summary(kind, manifest).items():
        facts.add_row(name, text if len(text) <= 400 else text[:397] + "…")
    console.print(facts, highlight=False, markup=False)
    if kind == "fusechat.results":
        print_results(manifest)
    if kind not in (TOPK_FORMAT, ALIGNED_FORMAT):
        return
    store = Store(path, kind, verify=verify)
    if kind == ALIGNED_FORMAT:
        print_coverage(read_coverage(path))
    sample = Table(box=None, pad_edge=False, title="sample", title_justify="left")
    for column in ("at", "token", "next", "kind", "distribution of the next token"):
        sample.add_column(column, no_wrap=column != "distribution of the next token")
    for line in sample_rows(store, dialogue, rows):
        sample.add_row(*line)
    console.print(sample, markup=False, highlight=False)
