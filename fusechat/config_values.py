"""A configuration before it is one: overrides, paths made absolute, and what is wrong with it in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fusechat.errors import ConfigError, nearest
from fusechat.yaml_file import parse_yaml

_ModelT = TypeVar("_ModelT", bound=BaseModel)
_NOTHING = ("", "~", "null", "Null", "NULL")


class Section(BaseModel):
    """A part of the configuration: a key that is not known and a number that is none are refused, and nothing changes
    once read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def validated(model: type[_ModelT], values: Any, where: str) -> _ModelT:
    """Return values as a model; raises ConfigError in one line, with the nearest known key for an unknown one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_explain(model, e) for e in error.errors())}") from error


def _explain(model: type[BaseModel], error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, error["loc"][:-1])
        return f"unknown key `{place}`{nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"`{place}` is required"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"  # not a whole section
    return f"`{place}`: {message}{given}" if place else message


def _known_keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def overridden(overrides: Sequence[str]) -> dict[str, Any]:
    """Return overrides such as `train.epochs=2` as nested values; raises ConfigError for one that is not such."""
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override `{override}` is not of the form key.subkey=value")
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override `{override}`: the value is not valid YAML") from error
        if value is None and text.strip() not in _NOTHING:
            raise ConfigError(f"override `{override}`: YAML reads a comment or a mark there: put it in quotes")
        *parents, last = key.split(".")
        section = changes
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"override `{override}`: `{parent}` was given a value of its own before")
        section[last] = value
    return changes


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return values with changes over them, section by section."""
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return result


def resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the paths of a raw configuration absolute, leaving hub ids (which do not exist as paths) alone."""

    def resolve(value: Any, *, must_be_path: bool = False) -> Any:
        if not isinstance(value, str):
            return value
        path = folder / Path(value).expanduser()
        looks_local = must_be_path or path.exists() or value.startswith((".", "/", "~"))
        return str(path) if looks_local else value

    def resolve_template(section: dict[str, Any]) -> None:
        options = section.get("extract")
        template = options.get("template") if isinstance(options, dict) else None
        if isinstance(options, dict) and template not in (None, "own", "pivot", "plain"):
            is_file = str(template).endswith((".jinja", ".jinja2"))
            section["extract"] = options | {"template": resolve(template, must_be_path=is_file)}

    for key, must_be_path in (("pivot", False), ("out", True), ("stores", True)):
        if key in values:
            values[key] = resolve(values[key], must_be_path=must_be_path)
    resolve_template(values)
    sources = values.get("sources")
    if isinstance(sources, list):
        named = [{"model": source} if isinstance(source, str) else source for source in sources]
        values["sources"] = [s | {"model": resolve(s.get("model"))} if isinstance(s, dict) else s for s in named]
        for source in values["sources"]:
            if isinstance(source, dict):
                resolve_template(source)
    data = values.get("data")
    if isinstance(data, dict):
        for key in ("train", "held_out", "validation"):
            if key in data:
                data[key] = resolve(data[key])
