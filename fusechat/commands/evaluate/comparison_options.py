"""The options of every command that compares models, with intervals."""

from __future__ import annotations

from typing import Annotated

import typer

Models = Annotated[
    list[str], typer.Argument(help="directories or hub ids; the first is compared with", show_default=False)
]
HeldOut = Annotated[
    str, typer.Option(help="dialogues: a file, a hub id, or a run, for those it held out", show_default=False)
]
Limit = Annotated[int | None, typer.Option(help="only so many dialogues", min=1)]
Against = Annotated[str | None, typer.Option(help="the model compared with; the first unless given")]
Samples = Annotated[int, typer.Option(help="of the bootstrap", min=100, max=100_000)]
Confidence = Annotated[float, typer.Option(help="of the intervals", min=0.5, max=0.999)]
Seed = Annotated[int, typer.Option(help="of the bootstrap", min=0, max=2**32 - 1)]
