"""What a run fuses on, chooses on, and tests on: three sets without a dialogue in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusechat.config import DataConfig, RunConfig
from fusechat.dialogue import LoadReport, load_dialogues, read_dialogues, split_held_out
from fusechat.records import Dialogue


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The dialogues of a run; `validation` is empty unless it is named or a sweep of merges needs one."""

    train: list[Dialogue]
    validation: list[Dialogue]
    held_out: list[Dialogue]
    loaded: LoadReport


def read_options(data: DataConfig) -> dict[str, Any]:
    """Return how the files of a run are read, for `read_dialogues`."""
    return {"format": data.format, "separator": data.separator, "max_bytes": data.max_bytes}


def load_split(config: RunConfig) -> Split:
    """Read the data of a run and cut it, the same way every time."""
    data = config.data
    options = read_options(data)
    dialogues, loaded = read_dialogues(data.train, limit=data.limit, **options)
    if data.held_out is not None:
        held_out = load_dialogues(data.held_out, **options)
    else:
        dialogues, held_out = split_held_out(dialogues, data.held_out_fraction, config.seed)
    validation: list[Dialogue] = []
    if data.validation is not None:
        validation = load_dialogues(data.validation, **options)
    elif config.merge.sweep:
        dialogues, validation = split_held_out(dialogues, data.validation_fraction, config.seed)
    return Split(train=dialogues, validation=validation, held_out=held_out, loaded=loaded)
