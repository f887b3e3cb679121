"""The options of every command that reads dialogues: how a file of them is read."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

FormatName = Literal["auto", "sharegpt", "messages", "alpaca", "text"]
Format = Annotated[FormatName, typer.Option(help="layout of the data")]
Separator = Annotated[list[str] | None, typer.Option(help="what separates documents in a text file")]
MaxBytes = Annotated[int | None, typer.Option(help="cut running text into pieces of so many bytes")]
