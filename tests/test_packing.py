"""Packed token columns give back what was packed, and what cannot be packed without loss is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fusechat.errors import FormatError
from fusechat.packing import TOKEN_COLUMNS, is_packed, pack, unpack
from fusechat.store import make_block, map_block, write_block

runs = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 300), min_size=1, max_size=5)), max_size=5)


def _dialogue(index: int, parts: list[tuple[bool, list[int]]], vocab_size: int, rng: Any) -> dict[str, Any]:
    """Runs of tokens with the widths given, each an assistant turn or not; turns side by side are two turns."""
    turn, byte_end, number = [], [], 0
    for taught, widths in parts:
        turn += [number if taught else -1] * len(widths)
        byte_end += np.cumsum(widths).tolist() if taught else [-1] * len(widths)
        number += taught
    n = len(turn)
    rows = int((np.array(turn[1:]) >= 0).sum()) if n else 0
    return {
        "dialogue.index": np.array([index]),
        "token.input_ids": rng.integers(0, vocab_size, n, dtype=np.int32),
        "token.loss_mask": np.array(turn, dtype=np.int32) >= 0,
        "token.turn": np.array(turn, dtype=np.int32),
        "token.byte_end": np.array(byte_end, dtype=np.int32),
        "row.gold_logprob": -rng.random(rows).astype(np.float32),
    }


@given(st.lists(runs, min_size=1, max_size=5), st.sampled_from([300, 65_536, 70_000]))
def test_what_was_packed_comes_back(dialogues: list[Any], vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    records = [_dialogue(i, parts, vocab_size, rng) for i, parts in enumerate(dialogues)]
    block = make_block(records)
    columns, offsets = pack(block.columns, block.offsets)
    wide = any(taught and max(widths) > 255 for parts in dialogues for taught, widths in parts)
    assert is_packed(columns) != wide
    if not wide:
        back = unpack(columns, offsets["token"], offsets["turn"])
        assert back.keys() == block.columns.keys()
        for name in back:
            np.testing.assert_array_equal(back[name], block[name], strict=True)


@pytest.mark.parametrize("name", TOKEN_COLUMNS)
def test_columns_that_contradict_each_other_are_stored_as_they_are(name: str, tmp_path: Path) -> None:
    record = _dialogue(0, [(False, [1, 2]), (True, [3, 4, 5]), (False, [6])], 300, np.random.default_rng(0))
    values = record[name] = record[name].copy()
    if values.dtype == np.bool_:
        values[0] = True
    else:
        values[[2, 4]] = [200, -1] if name != "token.input_ids" else [-3, 2]
    block = make_block([record])
    assert not is_packed(pack(block.columns, block.offsets)[0])
    write_block(tmp_path / "b.safetensors", block)
    for key, found in map_block(tmp_path / "b.safetensors").columns.items():
        np.testing.assert_array_equal(found, record[key], strict=True)


@pytest.mark.parametrize(
    ("column", "change"), [("turn.end", 99), ("turn.begin", -1), ("turn.begin", 4), ("masked.width", None)]
)
def test_turns_that_do_not_fit_are_refused(tmp_path: Path, column: str, change: int | None) -> None:
    """A foreign or damaged file must not read beyond its tokens."""
    record = _dialogue(0, [(False, [1, 2]), (True, [3, 4, 5])], 300, np.random.default_rng(0))
    path = tmp_path / "b.safetensors"
    write_block(path, make_block([record]))
    tensors = load_file(path)
    assert is_packed(tensors)
    if change is None:
        tensors[column], tensors["offset.masked"] = tensors[column][:-1], tensors["offset.masked"] - [0, 1]
    else:
        tensors[column] = tensors[column] * 0 + np.int32(change)
    save_file(tensors, path)
    with pytest.raises(FormatError, match="turns that do not fit"):
        map_block(path)
