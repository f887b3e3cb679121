"""fusechat train PIVOT --pivot-store STORE --aligned STORE --out DIR [key=value ...]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    pivot: Annotated[str, typer.Argument(help="directory or hub id of the pivot", show_default=False)],
    pivot_store: Annotated[Path, typer.Option(help="the pivot's TopKStore", show_default=False)],
    out: Annotated[Path, typer.Option(help="directory of the target", show_default=False)],
    aligned: Annotated[Path | None, typer.Option(help="a source's AlignedStore; without it, plain SFT")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(help="settings such as hard_weight=0.9 epochs=2")] = None,
) -> None:
    """Train one target from the pivot by pairwise fusion with one source."""
    from fusechat.commands.progress import terminal_reporter
    from fusechat.config import parse_train
    from fusechat.train import train as train_target

    settings = parse_train(overrides or [])
    with terminal_reporter() as reporter:
        provenance = train_target(
            pivot, pivot_store, aligned, out, settings, seed=seed, progress=reporter.stage("train", "steps")
        )
        loss = f"loss {provenance['losses'][-1]:.4f}, " if provenance["losses"] else ""
        reporter.done("train", f"{loss}model in {out}")
