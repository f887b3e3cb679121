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
from fusechat.packing import TOKEN_COLUMNS, is_packed, pack, unpack, unpacked_names
from fusechat.store import Record, make_block, map_block, map_stored, row_positions, write_block

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


def _with_rows(record: dict[str, Any], k: int, share: float, rng: Any, *, smallest: float = -9) -> dict[str, Any]:
    """Add rows whose ids hold the gold token in a share of them, from certain to hopeless, some entries absent."""
    rows = row_positions(record["token.loss_mask"])
    gold = record["token.input_ids"][rows + 1]
    scale = 10.0 ** rng.uniform(smallest, 2, (len(rows), 1))
    logprobs = -np.sort(scale * rng.exponential(1.0, (len(rows), k)), axis=1).astype(np.float32)
    logprobs[rng.random(len(rows)) < 0.1, k // 2 :] = -np.inf
    ids = np.array([rng.choice(90_000, k, replace=False) for _ in rows], dtype=np.int32).reshape(len(rows), k)
    place = rng.integers(0, k, len(rows))
    every = np.arange(len(rows))
    there = rng.random(len(rows)) < share
    ids[every[there], place[there]] = gold[there]
    own = np.where(there & np.isfinite(logprobs[every, place]), logprobs[every, place], -7.25)
    return record | {
        "row.ids": ids,
        "row.logprobs": logprobs.astype(np.float16),
        "row.gold_logprob": own.astype(np.float32),
    }


@given(
    dialogues=st.lists(runs, min_size=1, max_size=5), k=st.sampled_from([1, 10, 300]),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]), vocab_size=st.sampled_from([300, 70_000]), seed=st.integers(0, 9),
)  # fmt: skip
def test_gold_tokens_come_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, dialogues: list[Any], k: int, share: float, vocab_size: int, seed: int
) -> None:
    """As a whole shard and dialogue by dialogue: certain tokens (float16 has few bits there), and absent entries."""
    rng = np.random.default_rng(seed)
    records = [_with_rows(_dialogue(i, p, vocab_size, rng), k, share, rng) for i, p in enumerate(dialogues)]
    block = make_block(records)
    columns, _ = pack(block.columns, block.offsets)
    if is_packed(columns):
        assert sorted(unpacked_names(columns)) == sorted(block.columns)
    path = tmp_path_factory.mktemp("b") / "b.safetensors"
    write_block(path, block)
    mapped, stored = map_block(path), map_stored(path)
    assert mapped.columns.keys() == block.columns.keys()
    for name in block.columns:
        np.testing.assert_array_equal(_bits(mapped[name]), _bits(block[name]), strict=True)
        for i, record in enumerate(records):
            np.testing.assert_array_equal(_bits(Record(stored, i)[name]), _bits(record[name]), strict=True)


def _bits(values: Any) -> Any:
    """Values by their bits, so that −0 and 0 differ."""
    return values.view(np.dtype(f"u{values.itemsize}")) if values.dtype.kind == "f" else values


def test_a_gold_token_of_ten_takes_three_bytes() -> None:
    """In a dialogue, too, whose first token is the assistant's, which no row predicts."""
    rng = np.random.default_rng(0)
    record = _with_rows(_dialogue(0, [(True, [3] * 1000), (False, [1] * 100)], 300, rng), 10, 1.0, rng, smallest=-3)
    columns, _ = pack((block := make_block([record])).columns, block.offsets)
    rows = len(record["row.ids"])
    found = len(columns["found.rest"])
    assert found > 0.9 * rows
    assert columns["row.rank"].nbytes + columns["found.rest"].nbytes == rows + 2 * found
    assert len(columns["missed.input_ids"]) == rows - found
    assert len(columns["given.input_ids"]) == 1 + 100


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


@pytest.mark.parametrize(
    ("column", "change"),
    [("row.rank", 10), ("row.rank", 255), ("given.input_ids", None), ("offset.token", 1), ("found.rest", None)],
)
def test_gold_tokens_that_do_not_fit_are_refused(tmp_path: Path, column: str, change: int | None) -> None:
    rng = np.random.default_rng(0)
    record = _with_rows(_dialogue(0, [(False, [1, 2]), (True, [3, 4, 5] * 9)], 300, rng), 10, 0.9, rng)
    path = tmp_path / "b.safetensors"
    write_block(path, make_block([record]))
    tensors = load_file(path)
    assert "row.rank" in tensors
    if column == "offset.token":
        tensors[column] += change
    elif change is None:
        offset = f"offset.{column.partition('.')[0]}"
        tensors[column], tensors[offset] = tensors[column][:-1], tensors[offset] - [0, 1]
    else:
        tensors[column][np.flatnonzero(tensors[column] != 255)[0]] = change
    save_file(tensors, path)
    with pytest.raises(FormatError, match="gold tokens that do not fit"):
        map_block(path)
