"""What models are called in tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusechat.errors import ConfigError


def model_names(models: Sequence[str]) -> dict[str, str]:
    """Return models by the last part of their path; raises ConfigError when two are called the same."""
    names = {Path(model).name: model for model in models}
    if len(names) < len(models):
        raise ConfigError("two of the models have the same last name: evaluate them from differently named directories")
    return names


def file_names(files: Sequence[Path]) -> dict[str, Path]:
    """Return files by their name without ending, which is the model's; raises ConfigError when two are called the
    same."""
    names = {file.name.removesuffix(file.suffix): file for file in files}
    if len(names) < len(files):
        raise ConfigError("two of the files have the same name, which is the model's: rename one")
    return names
