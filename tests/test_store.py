"""Stores give back what was written, resume where they stopped, and refuse what they did not write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusechat.artifact import (
    ShardedWriter,
    atomic_write,
    differences,
    full_disk_is_named,
    read_json,
    require_free_bytes,
)
from fusechat.errors import FormatError, FusechatError, MismatchError
from fusechat.store import TOPK_FORMAT, TOPK_VERSION, Block, id_dtype, make_block, open_topk, row_positions, write_block

REQUEST = {"format": TOPK_FORMAT, "version": TOPK_VERSION, "model_sha256": "a" * 64, "top_k": 3}


def _dialogue(index: int, tokens: int, rng: np.random.Generator) -> dict[str, Any]:
    mask = rng.random(tokens) < 0.5
    mask[:1] = False
    rows = len(row_positions(mask))
    return {
        "dialogue.index": np.array([index]),
        "token.input_ids": rng.integers(0, 99, tokens, dtype=np.int32),
        "token.loss_mask": mask,
        "row.ids": rng.integers(0, 99, (rows, 3)).astype(np.uint16),
        "row.logprobs": -rng.random((rows, 3)).astype(np.float16),
    }


def _write_store(out: Path, dialogues: list[dict[str, Any]], per_shard: int, *, finish: bool = True) -> ShardedWriter:
    writer = ShardedWriter(out, REQUEST)
    for number, begin in enumerate(range(0, len(dialogues), per_shard)):
        name = f"shard-{number:05d}.safetensors"
        if name not in writer.done:
            block = make_block(dialogues[begin : begin + per_shard])
            writer.add(name, lambda path, block=block: write_block(path, block), n_dialogues=len(block))
    if finish:
        writer.finish()
    return writer


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), per_shard=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_random_access_returns_every_dialogue_exactly(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_shard: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    indices = rng.permutation(1000)[: len(lengths)]
    dialogues = [_dialogue(int(i), n, rng) for i, n in zip(indices, lengths, strict=True)]
    out = tmp_path_factory.mktemp("store") / "s"
    _write_store(out, dialogues, per_shard)
    store = open_topk(out)
    assert len(store) == len(dialogues)
    for written in dialogues:
        read = store[int(written["dialogue.index"][0])]
        assert read.keys() == written.keys()
        for key in written:
            np.testing.assert_array_equal(read[key], written[key], strict=True)
    whole = [store.shard(s).at(i) for s in range(store.n_shards) for i in range(len(store.shard(s)))]
    assert [int(r["dialogue.index"][0]) for r in whole] == [int(d["dialogue.index"][0]) for d in dialogues]


def _some(seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [_dialogue(i, 9, rng) for i in range(6)]


def test_an_interrupted_store_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    _write_store(tmp_path / "whole", _some(), 2)
    _write_store(tmp_path / "cut", _some()[:4], 2, finish=False)
    with pytest.raises(FormatError, match="not a complete artefact"):
        open_topk(tmp_path / "cut")
    (tmp_path / "cut" / "shard-00001.safetensors").write_bytes(b"torn")  # redone
    _write_store(tmp_path / "cut", _some(), 2)
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir()}


def test_another_request_is_refused_naming_both_values(tmp_path: Path) -> None:
    _write_store(tmp_path / "s", _some(), 2)
    with pytest.raises(MismatchError, match="top_k: 3 there, 4 here"):
        ShardedWriter(tmp_path / "s", REQUEST | {"top_k": 4})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("precious")
    with pytest.raises(MismatchError, match="not ours"):
        ShardedWriter(tmp_path / "foreign", REQUEST)


def test_what_another_process_made_since_the_first_look_is_kept(tmp_path: Path) -> None:
    """Catches a second process, which loaded its model meanwhile, that writes over a store made from other inputs."""
    same, other = ShardedWriter(tmp_path / "s", REQUEST), ShardedWriter(tmp_path / "s", REQUEST | {"top_k": 4})
    _write_store(tmp_path / "s", _some()[:4], 2, finish=False).close()
    half = ShardedWriter(tmp_path / "s", REQUEST)
    assert same.begin()
    assert len(same.done) == 2
    same.finish()
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    assert not half.begin()
    with pytest.raises(MismatchError, match="top_k: 3 there, 4 here"), other:
        other.begin()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == made


def test_a_file_system_without_locks_is_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wait for a run that there is not, where a network's file system has no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(FusechatError, match=r"cannot be locked \(No locks available\): choose a place on another"):
        ShardedWriter(tmp_path / "s", REQUEST).begin()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "[]", r"manifest\.json is not ours, or damaged"),
        ("request.json", "[]", r"request\.json is not ours, or damaged"),
        ("shard-00007.safetensors.json", "[]", r"00007\.safetensors\.json is not ours, or damaged"),
        ("shard-00007.safetensors.json", '{"rows": 3}', "is not the note of a shard of ours"),
        ("shard-00007.safetensors.json", '{"file": "../x", "sha256": ""}', "is not the note of a shard of ours"),
    ],
)
def test_a_foreign_file_in_an_unfinished_store_is_one_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    """Catches a traceback, and a note that names a file elsewhere."""
    _write_store(tmp_path / "s", _some()[:4], 2, finish=False)
    (tmp_path / "s" / name).write_text(content)
    with pytest.raises(FormatError, match=message):
        ShardedWriter(tmp_path / "s", REQUEST)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "foreign"])
def test_damaged_shards_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    _write_store(tmp_path / "s", _some(), 2)
    shard = tmp_path / "s" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "truncate":
        shard.write_bytes(data[:-7])
    elif damage == "flip":
        data[-3] ^= 1
        shard.write_bytes(data)
    elif damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(b"\xff" * len(data))
    with pytest.raises(FormatError, match="shard-00001") as error:
        open_topk(tmp_path / "s")
    assert "\n" not in str(error.value)
    if damage in ("truncate", "foreign"):
        with pytest.raises(FormatError, match="shard-00001"):
            open_topk(tmp_path / "s", verify=False)


def test_offsets_that_do_not_fit_their_columns_are_refused(tmp_path: Path) -> None:
    block = make_block(_some())
    broken = dict(block.offsets)
    broken["row"] = broken["row"] + 1
    writer = ShardedWriter(tmp_path / "s", REQUEST)
    bad = Block(columns=block.columns, offsets=broken)
    writer.add("shard-00000.safetensors", lambda path: write_block(path, bad))
    writer.finish()
    with pytest.raises(FormatError, match="offsets that do not fit row"):
        open_topk(tmp_path / "s")


def test_manifests_of_other_kinds_and_versions_are_refused(tmp_path: Path) -> None:
    _write_store(tmp_path / "s", _some(), 2)
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in (
        ({"version": 9}, "version 9"),
        ({"format": "other"}, "other artefact"),
        (None, "not valid JSON"),
    ):
        path.write_text(json.dumps(manifest | change) if change else "{")
        with pytest.raises(FormatError, match=message):
            open_topk(tmp_path / "s")


def _write_half(path: Path, failure: Exception) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise failure


def test_a_failed_write_leaves_the_old_file_and_no_partial(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    for failure, seen in ((ZeroDivisionError(), ZeroDivisionError), (OSError(28, "No space left"), FusechatError)):
        with pytest.raises(seen) as error:
            _write_half(path, failure)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
    assert "No space left; free space or choose another place" in str(error.value)


def test_too_little_disk_is_said_before_work_begins(tmp_path: Path) -> None:
    require_free_bytes(tmp_path / "not" / "there", 1)
    with pytest.raises(FusechatError, match="are free"):
        require_free_bytes(tmp_path, 10**18)


def test_ids_take_two_bytes_while_they_fit() -> None:
    assert id_dtype(65_536) == np.uint16
    assert id_dtype(65_537) == np.int32


def test_differences_name_both_sides() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 3 there, 2 here", "c: 4 there, null here"]


def test_what_a_library_raises_on_a_full_disk_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FusechatError, match="is full: free space"), full_disk_is_named(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(RuntimeError, match="another"), full_disk_is_named(tmp_path):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 130048 vs 129936"),
    ],
)
def test_a_write_without_room_is_one_line_though_the_disk_is_free(tmp_path: Path, error: Exception) -> None:
    """Quotas and limits of file sizes leave the disk free; libraries wrap the error or keep only its text."""
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = error
    with pytest.raises(FusechatError, match="could not be written to its end"), full_disk_is_named(tmp_path):
        raise wrapped


def test_json_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """Catches tracebacks for a folder in a file's place, and for what is too deep, too long or no text at all."""
    for name, content in {"deep": b"[" * 100_000, "long": b"1" * 5000, "latin": b'"\xe9"'}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=f"{name} is not valid JSON"):
            read_json(tmp_path / name)
    with pytest.raises(FormatError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
