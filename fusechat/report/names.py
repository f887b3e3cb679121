"""How a run's models are called."""

from __future__ import annotations

from fusechat.artifact import Json
from fusechat.config import short_name


def source_names(config: Json) -> list[str]:
    """Return the short names of a run's sources, in the order of its settings."""
    return [
        str(source.get("name") or short_name(str(source.get("model") or ""))) for source in config.get("sources") or ()
    ]
