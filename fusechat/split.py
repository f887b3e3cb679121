"""What a run fuses on, chooses on, and tests on: three sets without a dialogue in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusechat.config import DataConfig, RunConfig
from fusechat.dialogue import LoadReport, dialogue_key, load_dialogues, read_dialogues, split_held_out
from fusechat.errors import DataError
from fusechat.records import Dialogue

FUSED_ON = "dialogue to fuse on that is held out or chosen on, too"
VALIDATED = "dialogue to choose on that is held out, too"


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
    """Read the data of a run and cut it, the same way every time.

    What is held out stays whole: a dialogue that stands there, too, is dropped from the validation set and from what is
    fused on, one of the validation set from what is fused on; the report counts them. Raises DataError when none is
    left.
    """
    data = config.data
    options = read_options(data)
    dialogues, loaded = read_dialogues(data.train, limit=data.limit, **options)
    dropped: dict[str, int] = {}
    others: list[Dialogue] = []  # what was not cut off from `dialogues`, and may have some in common with them
    if data.held_out is not None:
        others = held_out = load_dialogues(data.held_out, **options)
    else:
        dialogues, held_out = split_held_out(dialogues, data.held_out_fraction, config.seed)
    validation: list[Dialogue] = []
    if data.validation is not None:
        validation = load_dialogues(data.validation, **options)
        validation = _without(validation, held_out, VALIDATED, dropped)
        others = [*others, *validation]
    dialogues = _without(dialogues, others, FUSED_ON, dropped)
    if data.validation is None and config.merge.sweep:
        dialogues, validation = split_held_out(dialogues, data.validation_fraction, config.seed)
    loaded = replace(loaded, dropped=loaded.dropped | dropped)
    return Split(train=dialogues, validation=validation, held_out=held_out, loaded=loaded)


def _without(
    dialogues: list[Dialogue], others: Sequence[Dialogue], reason: str, dropped: dict[str, int]
) -> list[Dialogue]:
    """Return the dialogues that are not among the others, and count the rest; raises DataError when none is left."""
    if not others:
        return dialogues
    taken = {dialogue_key(dialogue) for dialogue in others}
    left = [dialogue for dialogue in dialogues if dialogue_key(dialogue) not in taken]
    if not left:
        raise DataError(f"all {len(dialogues)} dialogues are dropped, each a {reason}: name files of different ones")
    if len(left) < len(dialogues):
        dropped[reason] = len(dialogues) - len(left)
    return left
