"""fusechat.checkpoint: what a model directory holds, and what it must not be believed about itself."""

from __future__ import annotations

import json
import shutil
import struct
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fusechat.checkpoint import (
    checkpoint_sha256,
    hub_commit,
    open_checkpoint,
    read_header,
    read_tensor,
    resolve_model,
)
from fusechat.errors import DataError, FormatError
from fusechat.merge import output
from fusechat.tokenizer import tokenizer_files


def write_raw(path: Path, header: Any, data: bytes = b"", *, declared: int | None = None) -> Path:
    """Write a safetensors file with any header at all: a JSON value, a text or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if declared is None else declared) + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """Return a header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded two-tensor model directory."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, directory / "one.safetensors")
    save_file({"b": np.arange(4, dtype=np.int64)}, directory / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    """Catches wrong offsets and shapes: every array written by safetensors itself comes back."""
    arrays = {
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 7), np.float16),
        "matrix": np.arange(35, dtype=np.float64).reshape(5, 7),
        "flags": np.array([True, False, True]),
        "steps": np.arange(3, dtype=np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors")
    assert entries.keys() == arrays.keys()
    for name, array in arrays.items():
        found = read_tensor(entries[name])
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_bf16_is_exact(tmp_path: Path) -> None:
    """Catches byte order and sign mistakes in widening: every one of the 65,536 patterns."""
    patterns = np.arange(65536, dtype=np.uint16)
    path = write_raw(tmp_path / "x.safetensors", {"w": entry("BF16", [256, 256], 0, 131072)}, patterns.tobytes())
    wide = read_tensor(read_header(path)["w"])
    assert wide.shape == (256, 256)
    np.testing.assert_array_equal(wide.ravel().view(np.uint32), patterns.astype(np.uint32) << 16)


def test_sharded_and_single(model: Path) -> None:
    """Catches an index that is not followed."""
    checkpoint = open_checkpoint(model)
    assert [p.name for p in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert read_tensor(checkpoint.tensors["b"]).tolist() == [0, 1, 2, 3]
    assert checkpoint.config["model_type"] == "llama"


ONE_BYTE = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HOSTILE: list[tuple[str, Any, bytes]] = [
    ("overlap", {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"x" * 6),
    ("hole", {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, b"x" * 6),
    ("beyond the end", {"a": entry("U8", [8], 0, 8)}, b"x" * 4),
    ("2^60 elements", {"a": entry("F32", [2**60], 0, 4)}, b"x" * 4),
    ("2^60 bytes", {"a": entry("U8", [2**60], 0, 2**60)}, b"x" * 4),
    ("product wraps to the size", {"a": entry("U8", [2**32, 2**32 + 1], 0, 2**32)}, b"x" * 4),
    ("negative offsets", {"a": entry("U8", [4], -4, 0)}, b"x" * 4),
    ("backwards", {"a": entry("U8", [0], 4, 0)}, b"x" * 4),
    ("negative dimension", {"a": entry("U8", [-2, -2], 0, 4)}, b"x" * 4),
    ("bool dimension", {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"x"),
    ("float dimension", {"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}, b"x"),
    ("unknown dtype", {"a": entry("F13", [1], 0, 1)}, b"x"),
    ("dtype is a list", {"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}, b"x"),
    ("no entry", {"a": 7}, b""),
    ("no object", [1, 2], b""),
    ("trailing bytes", {"a": entry("U8", [1], 0, 1)}, b"xy"),
    ("duplicate name", b"{" + b",".join([ONE_BYTE, ONE_BYTE]) + b"}", b"x"),
    ("not UTF-8", b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    ("not JSON", b"{", b""),
    ("bottomless nesting", b"[" * 100_000, b""),
    ("endless number", b'{"a": ' + b"9" * 10_000 + b"}", b""),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_headers_are_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    """Catches trust in a stranger's sizes: each lie ends in one line that names the file."""
    path = write_raw(tmp_path / "hostile.safetensors", header, data)
    with pytest.raises(FormatError, match=r"hostile\.safetensors") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("declared", [2**63, 2**64 - 1, 10**9, 500])
def test_header_length_is_checked_before_reading(tmp_path: Path, declared: int) -> None:
    """Catches an allocation of the declared length."""
    path = write_raw(tmp_path / "x.safetensors", {}, declared=declared)
    with pytest.raises(FormatError, match="truncated or no safetensors"):
        read_header(path)


@given(
    cut=st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    """Catches any other exception than FormatError from random damage, and ranges outside the file."""
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    save_file({"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float16)}, path)
    raw = bytearray(path.read_bytes()[: path.stat().st_size - cut])
    for position, value in flips:
        if raw:
            raw[position % len(raw)] = value
    path.write_bytes(bytes(raw))
    try:
        entries = read_header(path)
    except FormatError:
        return
    for found in entries.values():
        assert 0 <= found.begin <= found.end <= len(raw)
        assert read_tensor(found).size == found.n_elements


def test_index_cannot_leave_its_folder(model: Path) -> None:
    """Catches path traversal through weight_map."""
    for name in ("../one.safetensors", "/etc/passwd", "..", ""):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(FormatError, match="outside its folder"):
            open_checkpoint(model)


def test_index_and_shards_must_agree(model: Path) -> None:
    """Catches a tensor that silently goes missing, in both directions, and a missing shard."""
    index = model / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for weight_map, message in [
        (good["weight_map"] | {"c": "one.safetensors"}, "does not hold 'c'"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "does not hold 'b'"),
        ({"b": "two.safetensors", "x": "one.safetensors"}, "holds 'a'"),
        (good["weight_map"] | {"c": "three.safetensors"}, "three.safetensors is missing"),
        (7, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError, match=message):
            open_checkpoint(model)


def test_pickled_and_missing_weights_are_refused(tmp_path: Path) -> None:
    """Catches unpickling, and a message without the mend."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="not a complete model directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="save_pretrained"):
        open_checkpoint(tmp_path)
    with pytest.raises(DataError, match="not a model directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_fingerprint_sees_weights_and_config_but_not_the_place(model: Path, tmp_path: Path) -> None:
    """Catches a fingerprint from names, sizes or times alone."""
    before = checkpoint_sha256(model)
    shutil.copytree(model, tmp_path / "copy")
    assert checkpoint_sha256(tmp_path / "copy") == before
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "qwen2"}')
    assert checkpoint_sha256(tmp_path / "copy") != before
    raw = bytearray((model / "two.safetensors").read_bytes())
    raw[-1] ^= 1
    (model / "two.safetensors").write_bytes(bytes(raw))
    assert checkpoint_sha256(model) != before


def test_hub_ids_may_name_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a revision taken for a part of the name, and a commit nobody wrote down."""
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub_commit(resolve_model("owner/name@v1.0")) == commit
    assert resolve_model("owner/name") == snapshot
    assert asked == [("owner/name", "v1.0"), ("owner/name", None)]
    (tmp_path / "a@b").mkdir()
    assert resolve_model(str(tmp_path / "a@b")) == tmp_path / "a@b"
    for own in (tmp_path / "a@b", tmp_path / "snapshots" / "step-500", tmp_path / "other" / commit):
        assert hub_commit(own) is None


TOKENIZER_NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "qwen.tiktoken", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def test_everything_that_a_merge_copies_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tokenizer that a model of the hub has and the models made from it lack."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **options: asked.update(options) or tmp_path)
    for weights in (True, False):
        assert resolve_model("somebody/model", weights=weights) == tmp_path
        patterns = asked["allow_patterns"]
        for name in (*TOKENIZER_NAMES, *output._BASE_FILES, "config.json"):
            assert any(fnmatch(name.replace("*", "qwen"), pattern) for pattern in patterns), name
        assert any(fnmatch("model.safetensors", pattern) for pattern in patterns) == weights
    for name in TOKENIZER_NAMES:
        (tmp_path / name).touch()
    assert {path.name for path in tokenizer_files(tmp_path)} == set(TOKENIZER_NAMES)
