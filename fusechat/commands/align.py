"""fusechat align PIVOT_STORE SOURCE_STORE --out STORE [--ray ADDRESS]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def align(
    pivot_store: Annotated[Path, typer.Argument(help="TopKStore of the pivot", show_default=False)],
    source_store: Annotated[Path, typer.Argument(help="TopKStore of one source", show_default=False)],
    out: Annotated[Path, typer.Option(help="directory of the aligned store", show_default=False)],
    tokens: Annotated[str, typer.Option(help="how rows are matched: bytes, or dtw for parity")] = "bytes",
    vocab: Annotated[
        str, typer.Option(help="candidates without byte twin: exact, prefix, mined, ms, ms-soft or ms-upstream")
    ] = "prefix",
    granularity: Annotated[str, typer.Option(help="what finer rows teach: cells, chain, first or gold")] = "cells",
    unaligned: Annotated[str, typer.Option(help="rows without common boundary: gold, pivot or skip")] = "gold",
    collisions: Annotated[str, typer.Option(help="several source ids on one pivot id: sum or first")] = "sum",
    preset: Annotated[str | None, typer.Option(help="paper: all five choices as the research code's default")] = None,
    threads: Annotated[
        int | None, typer.Option(help="all this process may use when absent, one a task on Ray", min=1)
    ] = None,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster, or local: shards as tasks")] = None,
) -> None:
    """Carry one source's log-probabilities over to the pivot's positions and vocabulary."""
    from fusechat.align import align as align_stores
    from fusechat.commands.progress import terminal_reporter

    with terminal_reporter() as reporter:
        manifest = align_stores(
            pivot_store,
            source_store,
            out,
            tokens=tokens,
            vocab=vocab,
            granularity=granularity,
            unaligned=unaligned,
            collisions=collisions,
            preset=preset,
            workers=threads,
            ray=ray,
            progress=reporter.stage("align", "rows"),
        )
        coverage = manifest["coverage"]
        rows = ", ".join(f"{kind} {share:.1%}" for kind, share in coverage["rows"].items())
        mass = ", ".join(f"{fate} {share:.1%}" for fate, share in coverage["mass"].items())
        reporter.done("align", f"rows: {rows}; probability: {mass}")
