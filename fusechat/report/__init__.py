"""The report of a run: one HTML file that needs no network, Markdown and JSON beside it.

    run directory → facts (JSON, one entry a section) → charts (Vega, through altair) → page.html, page.md

Each section is a module of its own that reads what the run left and returns plain JSON values; a section whose
artefacts are not there says what is missing. The HTML embeds the charts' specifications and Vega itself (0.9 MB), which
the package vl-convert carries.
"""

from __future__ import annotations

from pathlib import Path

from fusechat.artifact import atomic_write
from fusechat.callable_module import make_callable
from fusechat.errors import ConfigError
from fusechat.layout import Layout
from fusechat.report.facts import gather
from fusechat.report.page import html_page, json_text, markdown_page

__all__ = ["report"]
make_callable(__name__)


def report(run: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run directory to `out` (its report.html when None), .md and .json beside; return its path.

    A run that is not finished is reported as far as it came. Raises ConfigError when `run` is no run's directory or
    `out` does not end in .html.
    """
    layout = Layout(out=Path(run))
    page = layout.report if out is None else Path(out)
    if page.suffix != ".html":
        raise ConfigError(
            f"{page}: the report is HTML, with Markdown and JSON beside it: give a name that ends in .html"
        )
    facts = gather(layout)
    page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (page.with_suffix(".json"), json_text(facts)),
        (page.with_suffix(".md"), markdown_page(facts)),
        (page, html_page(facts)),
    ):
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return page
