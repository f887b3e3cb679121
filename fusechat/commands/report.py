"""fusechat report RUN [--out report.html]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="the folder of a run, finished or not", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="the HTML file; RUN/report.html if absent")] = None,
) -> None:
    """Write what a run found as one HTML page that needs no network, with Markdown and JSON beside it."""
    from fusechat.report import report as write_report

    page = write_report(run, out)
    typer.echo(f"{page} ({page.stat().st_size / 1e6:.2f} MB), .md and .json beside it")
