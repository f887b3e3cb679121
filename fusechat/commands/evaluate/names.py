"""What models are called in tables, and other words of the command line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusechat.errors import ConfigError


def model_names(models: Sequence[str]) -> dict[str, str]:
    """Return models by the last part of their path, or by all of it where two have that in common; raises ConfigError
    for one that is named twice."""
    last = Counter(Path(model).name for model in models)
    names = {Path(model).name if last[Path(model).name] == 1 else str(Path(model)): model for model in models}
    if len(names) < len(models):
        raise ConfigError(f"a model is named twice among {', '.join(models)}: name it once")
    return names


def file_names(files: Sequence[Path]) -> dict[str, Path]:
    """Return files by their name without ending, which is the model's; raises ConfigError when two are called the
    same."""
    names = {file.name.removesuffix(file.suffix): file for file in files}
    if len(names) < len(files):
        raise ConfigError("two of the files have the same name, which is the model's: rename one")
    return names


def output_names(files: Sequence[Path]) -> dict[str, Path]:
    """Return alpaca_eval output files by the `generator` they name; raises ConfigError when two name the same."""
    from fusechat.evaluate.alpaca import load_outputs

    names = {str(load_outputs(file)[0].get("generator", file.stem)).replace("/", "_"): file for file in files}
    if len(names) < len(files):
        raise ConfigError("two of the files are of the same model (generator)")
    return names


def require_among(against: str | None, models: Iterable[str]) -> None:
    """Raise ConfigError when --against names none of the models, before anything is asked or computed."""
    names = list(models)
    if against is not None and against not in names:
        raise ConfigError(f"--against {against} is none of the models: there are {', '.join(names)}")


def key_values(words: Sequence[str]) -> dict[str, Any]:
    """Return words of the form key=value with their values read as YAML, all of them JSON; raises ConfigError."""
    import json

    import yaml

    from fusechat.yaml_file import parse_yaml

    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word} should have the form key=value")
        try:
            values[key] = parse_yaml(text)
            json.dumps(values[key], allow_nan=False)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word}: the value is not valid YAML") from error
        except (TypeError, ValueError) as error:  # a date, a set, NaN
            raise ConfigError(f'{word}: the value has no JSON form; text goes in quotes: {key}="{text}"') from error
    return values
