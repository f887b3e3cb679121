"""fusechat recipe [NAME]"""

from __future__ import annotations

from typing import Annotated

import typer


def recipe(
    name: Annotated[str | None, typer.Argument(help="one of them, to print", show_default=False)] = None,
) -> None:
    """List the recipes that come with the package, or print one: `fusechat recipe NAME > mine.yaml` to change it."""
    import shutil
    import textwrap

    from fusechat.recipe import PREFIX, find_recipe, purpose, recipes

    if name is not None:
        typer.echo(find_recipe(name.removeprefix(PREFIX), recipes()).read_text(encoding="utf-8"), nl=False)
        return
    columns = shutil.get_terminal_size().columns
    for known, path in recipes().items():
        typer.echo(textwrap.fill(f"{known:<24} {purpose(path)}", columns, subsequent_indent=" " * 25))
