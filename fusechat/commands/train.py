"""fusechat train PIVOT --pivot-store STORE --aligned STORE --out DIR [key=value ...]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusechat.commands import data_options as reading


def train(
    pivot: Annotated[str, typer.Argument(help="directory or hub id of the pivot", show_default=False)],
    pivot_store: Annotated[Path, typer.Option(help="the pivot's TopKStore", show_default=False)],
    out: Annotated[Path, typer.Option(help="directory of the target", show_default=False)],
    aligned: Annotated[
        list[Path] | None,
        typer.Option(
            help="a source's AlignedStore, or its TopKStore if it has the pivot's vocabulary; several with mode=multi; "
            "without any, plain SFT"
        ),
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="dialogues to score with every checkpoint")] = None,
    format: Annotated[reading.FormatName, typer.Option(help="layout of the held-out data")] = "auto",
    separator: reading.Separator = None,
    max_bytes: reading.MaxBytes = None,
    seed: Annotated[int, typer.Option(help="of the order, dropout and every random draw", min=0, max=2**32 - 1)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="two steps on two dialogues; leaves nothing")] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings such as hard_weight=0.9 epochs=2; --help lists them")
    ] = None,
) -> None:
    """Train one target from the pivot, taught by a source. Also under torchrun and accelerate launch."""
    if held_out is None and (format != "auto" or separator or max_bytes):
        raise typer.BadParameter("--format, --separator and --max-bytes say how --held-out is read: give that, too")
    from fusechat.commands.progress import terminal_reporter
    from fusechat.dialogue import load_dialogues
    from fusechat.train import train as train_target
    from fusechat.train_config import parse_train

    settings = parse_train([override.removeprefix("train.") for override in overrides or []])
    with terminal_reporter() as reporter:
        provenance = train_target(
            pivot,
            pivot_store,
            aligned,
            out,
            settings,
            seed=seed,
            held_out=load_dialogues(held_out, format=format, separator=separator, max_bytes=max_bytes)
            if held_out is not None
            else (),
            progress=reporter.stage("train", "steps"),
            dry_run=dry_run,
        )
        loss = f"loss {provenance['losses'][-1]:.4f}, " if provenance["losses"] else ""
        reporter.done("train", f"{loss}nothing kept: a dry run" if dry_run else f"{loss}model in {out}")
