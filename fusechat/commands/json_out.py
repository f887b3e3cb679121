"""--json of every command that has a result to compute with: a file, or - for stdout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

STDOUT = Path("-")


def _writable(path: Path | None) -> Path | None:
    from fusechat.artifact import require_writable
    from fusechat.errors import ConfigError

    if path is not None and path != STDOUT:  # now, and not when hours of work are to be written
        if path.is_dir():
            raise ConfigError(f"--json {path} is a folder: name a file in it")
        require_writable(path)
    return path


JsonOut = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="also write the result there; -: to stdout, no table", callback=_writable
    ),
]


def tell(result: Any, json_out: Path | None, show: Callable[[Any], None]) -> None:
    """Write a result where --json says, and show it, unless stdout is taken by the JSON."""
    from fusechat.artifact import write_json

    if json_out == STDOUT:
        import json

        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_out, result)
    show(result)
