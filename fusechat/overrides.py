"""A raw configuration before it is validated: dotted overrides, and paths made absolute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fusechat.errors import ConfigError


def nested(overrides: Sequence[str]) -> dict[str, Any]:
    """Return overrides such as `train.epochs=2` as nested mappings, values read as YAML; raises ConfigError."""
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override `{override}` is not of the form key.subkey=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override `{override}`: the value is not valid YAML") from error
        *parents, last = key.split(".")
        place = changes
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return changes


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes`, mapping by mapping: keys that are not named keep what they have."""
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

    for key, must_be_path in (("pivot", False), ("out", True)):
        if key in values:
            values[key] = resolve(values[key], must_be_path=must_be_path)
    sources = values.get("sources")
    if isinstance(sources, list):
        named = [{"model": source} if isinstance(source, str) else source for source in sources]
        values["sources"] = [s | {"model": resolve(s.get("model"))} if isinstance(s, dict) else s for s in named]
    data = values.get("data")
    if isinstance(data, dict):
        for key in ("train", "held_out", "validation"):
            if key in data:
                data[key] = resolve(data[key])
