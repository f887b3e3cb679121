"""The three sets of a run have no dialogue in common, whichever files they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusechat.config import parse_config
from fusechat.dialogue import dialogue_key
from fusechat.errors import DataError
from fusechat.split import FUSED_ON, VALIDATED, Split, load_split


@pytest.fixture
def split(tmp_path: Path) -> Any:
    def load(**files: range) -> Split:
        data = {}
        for name, numbers in files.items():
            turns = [[("user", f"question {n}"), ("assistant", f"answer {n}")] for n in numbers]
            items = [{"messages": [{"role": role, "content": text} for role, text in two]} for two in turns]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
            data[name] = str(tmp_path / f"{name}.jsonl")
        values = {"pivot": "p", "sources": [{"model": "s"}], "out": "o", "data": data}
        return load_split(parse_config(values, "test"))

    return load


def test_what_is_held_out_is_neither_fused_on_nor_chosen_on(split: Any) -> None:
    """Catches scores on training data, and dialogues dropped without a word."""
    got = split(train=range(20), held_out=range(15, 30), validation=range(12, 18))
    assert (len(got.train), len(got.validation), len(got.held_out)) == (12, 3, 15)
    assert got.loaded.dropped == {FUSED_ON: 8, VALIDATED: 3}
    keys = [{dialogue_key(d) for d in part} for part in (got.train, got.validation, got.held_out)]
    assert len(set.union(*keys)) == sum(map(len, keys))


def test_a_part_that_is_cut_off_is_kept_apart_from_a_named_one(split: Any) -> None:
    """Catches a validation file whose dialogues are cut off as held out."""
    got = split(train=range(40), validation=range(20))
    assert not {dialogue_key(d) for d in got.validation} & {dialogue_key(d) for d in [*got.train, *got.held_out]}
    assert got.loaded.dropped[FUSED_ON] + got.loaded.dropped[VALIDATED] == 20
    assert split(train=range(40)).loaded.dropped == {}


def test_a_held_out_text_is_dropped_where_it_is_a_piece_of_a_longer_one(tmp_path: Path) -> None:
    """Catches a score on text that was trained on because its document went on there."""
    (tmp_path / "train.txt").write_text("Once. More of it.\n---\nAnother.")
    (tmp_path / "held.txt").write_text("Once.\n---\nTwice.")
    data = {"train": str(tmp_path / "train.txt"), "held_out": str(tmp_path / "held.txt"), "separator": "---"}
    values = {"pivot": "p", "sources": [{"model": "s"}], "out": "o", "data": {**data, "max_bytes": 8}}
    got = load_split(parse_config(values, "test"))
    assert got.loaded.dropped == {FUSED_ON: 1}
    assert "Once." not in {d.messages[0].content for d in got.train}


def test_one_file_for_both_is_refused(split: Any) -> None:
    """Catches a run that is measured on what it was trained on."""
    with pytest.raises(DataError, match="all 9 dialogues are dropped, each a dialogue to fuse on that is held out"):
        split(train=range(9), held_out=range(9))
