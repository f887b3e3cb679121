"""fusechat extract MODEL --data FILE --out STORE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def extract(
    model: Annotated[str, typer.Argument(help="directory or hub id", show_default=False)],
    data: Annotated[str, typer.Option(help="file or hub id of the dialogues", show_default=False)],
    out: Annotated[Path, typer.Option(help="directory of the store", show_default=False)],
    top_k: Annotated[int, typer.Option(help="log-probabilities kept per row", min=1)] = 10,
    template: Annotated[str, typer.Option(help="own, or a tokenizer directory or .jinja file")] = "own",
    max_length: Annotated[int, typer.Option(help="tokens; longer dialogues are cut at a turn", min=2)] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    format: Annotated[
        Literal["auto", "sharegpt", "messages", "alpaca", "text"], typer.Option(help="layout of the data")
    ] = "auto",
    separator: Annotated[list[str] | None, typer.Option(help="what separates documents in a text file")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="cut running text into pieces of so many bytes")] = None,
) -> None:
    """Write a model's top-k next-token log-probabilities over a dialogue set."""
    from fusechat.commands.progress import terminal_reporter
    from fusechat.dialogue import load_dialogues
    from fusechat.extract import extract as extract_store

    dialogues = load_dialogues(data, format=format, separator=separator, max_bytes=max_bytes)
    with terminal_reporter() as reporter:
        manifest = extract_store(
            model,
            dialogues,
            out,
            top_k=top_k,
            template=template,
            max_length_tokens=max_length,
            dtype=dtype,
            progress=reporter.stage("extract", "tokens"),
        )
        rows = sum(shard["n_rows"] for shard in manifest["shards"])
        reporter.done("extract", f"{rows:,} rows in {out}, {len(manifest['skipped'])} dialogues skipped")
