"""Held-out dialogues: of a file, of a hub id, or of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat.config import RunConfig
    from fusechat.records import Dialogue


def run_config(data: str) -> RunConfig | None:
    """Return the settings of the run whose folder `data` is, None when it is none."""
    from fusechat.config import load_config
    from fusechat.layout import Layout

    config = Layout(out=Path(data)).config
    return load_config(config) if config.is_file() else None


def held_out(data: str, *, limit: int | None, **options: Any) -> list[Dialogue]:
    """Return the dialogues of `data`; of a run's folder those it held out, read and cut as the run did.

    `options` are those of `load_dialogues`; raises ConfigError when they are set beside a run, which has its own.
    """
    from fusechat.dialogue import load_dialogues
    from fusechat.errors import ConfigError
    from fusechat.split import load_split

    config = run_config(data)
    if config is not None:
        given = [f"--{key.replace('_', '-')}" for key, value in options.items() if value and value != "auto"]
        if given:
            raise ConfigError(f"{data} is a run, which says how its data is read: leave {' and '.join(given)} out")
        return load_split(config).held_out[:limit]
    return load_dialogues(data, limit=limit, **options)
