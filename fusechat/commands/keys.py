"""The keys of a section of the YAML, under the --help of the command that takes them as KEY=VALUE."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperCommand


def with_keys(section: str) -> type[TyperCommand]:
    """Return the class of a command whose help ends with the keys of a class of fusechat.config."""

    class WithKeys(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            # --max-length is max_length_tokens: what is an option above is not repeated.
            print_keys(section, without=tuple(str(parameter.name) for parameter in self.params))

    return WithKeys


def print_keys(section: str, *, without: tuple[str, ...] = ()) -> None:
    """Print every key with its default, what it is and what it may be; none that begin as `without` says."""
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fusechat import config

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 1))
    table.add_column(no_wrap=True)
    table.add_column()

    def add(model: type[BaseModel], prefix: str = "") -> None:
        for key, field in model.model_fields.items():
            if not prefix and key.startswith(without):
                continue
            default = _yaml(field.get_default(call_default_factory=True))
            said = Text(field.description or "")
            if choices := _choices(field.annotation):
                said.append(f" [{' | '.join(choices)}]", style="dim")
            table.add_row(Text(f"{prefix}{key}={default}", style="cyan"), said)
            for part in get_args(field.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    add(part, f"{prefix}{key}.")

    add(getattr(config, section))
    console = Console()
    console.print("KEY=VALUE, here with what holds when a key is not given:\n", highlight=False)
    console.print(table)


def _choices(annotation: Any) -> list[str]:
    """Return the words of a Literal, alone or in a union with others; none where anything may be said."""
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
