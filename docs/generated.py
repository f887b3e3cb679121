"""The pages of the reference that code writes: the keys of the YAML, and the commands."""

from __future__ import annotations

import inspect
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fusechat import config, train_config
from fusechat.cli import app
from fusechat.commands.merge import parser as merge_parser


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages (mkdocs calls this)."""
    files.append(File.generated(config, "reference/config.md", content=config_page()))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    return files


def config_page() -> str:
    """Return a table a section of the configuration."""
    parts = ["# Configuration\n\nEvery key of the YAML; what is unknown is refused with the nearest known name."]
    # As the file has them, but the whole before its parts.
    found = vars(config) | vars(train_config)
    classes = {name: value for name, value in found.items() if inspect.isclass(value)}
    for name in dict.fromkeys(("RunConfig", *classes)):
        section = classes[name]
        if not issubclass(section, BaseModel) or section.__module__ not in (config.__name__, train_config.__name__):
            continue
        rows = [_row(key, field) for key, field in section.model_fields.items()]
        table = "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])
        parts.append(f"## {name.removesuffix('Config')}\n\n{inspect.getdoc(section)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _row(key: str, field: FieldInfo) -> str:
    kind = _kind(field.annotation)
    default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
    if isinstance(field.default, BaseModel):
        default = "see its section"
    return f"| `{key}` | {kind} | {default} | {field.description or ''} |".replace("\n", " ")


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join("nothing" if part is type(None) else _kind(part) for part in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    return str(annotation.__name__).removesuffix("Config")


def cli_page() -> str:
    """Return every command's usage and options."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="fusechat")
    parts = ["# Commands\n\nAny command takes `--debug`, which shows the traceback of an error."]
    for name in group.list_commands(context):  # type: ignore[attr-defined]
        if name == "merge":
            parts.append(f"## fusechat merge\n\n```text\n{merge_parser().format_help()}```")
            continue
        parts.append(_command(group.get_command(context, name), f"fusechat {name}"))  # type: ignore[attr-defined]
    return "\n\n".join(parts) + "\n"


def _command(command: Any, path: str) -> str:
    context = typer.Context(command, info_name=path)
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        option = parameter.param_type_name == "option"
        names = ", ".join((*parameter.opts, *parameter.secondary_opts)) if option else parameter.name.upper()
        rows.append(f"| `{names}` | {getattr(parameter, 'help', None) or ''} |".replace("\n", " "))
    table = "\n".join(["| | what it does |", "|---|---|", *rows]) if rows else ""
    usage = " ".join(command.collect_usage_pieces(context))
    text = f"## {path}\n\n{command.help or ''}\n\n```text\n{path} {usage}\n```\n\n{table}"
    for name in getattr(command, "commands", {}):
        text += "\n\n" + _command(command.commands[name], f"{path} {name}").replace("## ", "### ", 1)
    return text
