"""How a run's models are called."""

from __future__ import annotations

from typing import Any

from fusechat.artifact import Json


def source_names(config: Json) -> list[str]:
    """Return the short names of a run's sources, in the order of its settings."""
    return [str(source.get("name") or short_name(source.get("model"))) for source in config.get("sources") or ()]


def short_name(model: Any) -> str:
    """Return the last part of a model's path or hub id."""
    return str(model or "").rstrip("/").rpartition("/")[2]
