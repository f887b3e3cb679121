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
