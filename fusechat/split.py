"""What a run fuses on, and what it holds out."""

from __future__ import annotations

from typing import Any

from fusechat.config import RunConfig
from fusechat.dialogue import LoadReport, load_dialogues, read_dialogues, split_held_out
from fusechat.records import Dialogue


def load_split(config: RunConfig) -> tuple[list[Dialogue], list[Dialogue], LoadReport]:
    """Return the dialogues to fuse on, those held out, and what reading them gave."""
    data = config.data
    options: dict[str, Any] = {"format": data.format, "separator": data.separator, "max_bytes": data.max_bytes}
    dialogues, loaded = read_dialogues(data.train, limit=data.limit, **options)
    if data.held_out is not None:
        return dialogues, load_dialogues(data.held_out, **options), loaded
    return *split_held_out(dialogues, data.held_out_fraction, config.seed), loaded
