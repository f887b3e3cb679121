"""fusechat run CONFIG.yaml|recipe:NAME [key=value ...]"""

from __future__ import annotations

from typing import Annotated

import typer


def run(
    config: Annotated[str, typer.Argument(help="YAML of the run, or recipe:NAME", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes such as train.epochs=2")] = None,
) -> None:
    """Do all stages of a fusion: extract, align, train, merge, evaluate. Finished stages are skipped."""
    from fusechat.commands.progress import terminal_reporter
    from fusechat.commands.results import print_results
    from fusechat.config import load_config
    from fusechat.run import run as run_all

    settings = load_config(config, overrides or [])
    with terminal_reporter() as reporter:
        results = run_all(settings, reporter=reporter)
    if results:
        print_results(results)
        typer.echo(f"everything is in {settings.out}; the report is report.html there")
