"""An HF model directory as a mapping of tensors, read from the safetensors headers alone, without torch.

Headers come from strangers, so every size in them is compared with the size of the file before anything is
allocated or read. `.bin` checkpoints are refused: reading them would execute what they hold.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.artifact import Json, read_json, sha256_file, sha256_json
from fusechat.errors import DataError, FormatError, first_line

if TYPE_CHECKING:  # headers alone, which is all a merge reads in Python, need no NumPy
    import numpy.typing as npt

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8", "C64": "<c8",
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
# Configuration, tokenizers of every kind, and code, which is copied beside a merged model and never run.
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "*.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `begin` and `end` are byte offsets in `file`, `dtype` is safetensors' name."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_elements(self) -> int:
        """The product of the shape (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """The size of the data."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model directory: its config, its tensors by name in file order, and its weight files."""

    directory: Path
    config: Json
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the config and all weight headers of a model directory, single-file or sharded.

    Raises DataError when the directory is no model or holds only pickled weights, FormatError (naming the
    file) when a header, the index or the config is corrupt, truncated or hostile.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is not a model directory: give a folder with config.json and safetensors weights")
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{directory / 'config.json'} is not a JSON object")
    tensors = read_weights(directory, SINGLE_FILE, INDEX_FILE)
    files = tuple(dict.fromkeys(entry.file for entry in tensors.values()))
    return Checkpoint(directory=directory, config=config, tensors=tensors, files=files)


def read_weights(directory: Path, single: str, index: str) -> dict[str, TensorEntry]:
    """Return the tensors of `single`, or of the shards `index` names; raises as `open_checkpoint` does."""
    if (directory / index).exists():
        return _read_sharded(directory, directory / index)
    if (directory / single).exists():
        return read_header(directory / single)
    pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pth"))
    if pickled:
        load = f"t.AutoModelForCausalLM.from_pretrained('{directory}', dtype='auto')"
        raise DataError(
            f"{directory} holds pickled weights ({pickled[0]}), which execute code when read: convert them "
            f'once where you trust them, with python -c "import transformers as t; {load}'
            ".save_pretrained('NEW_FOLDER')\""
        )
    raise DataError(f"{directory} has neither {single} nor {index}: it is not a complete model directory")


def _read_sharded(directory: Path, index: Path) -> dict[str, TensorEntry]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise FormatError(f"{index} has no weight_map from tensor names to file names")
    tensors: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if shard in ("", ".", "..") or Path(shard).name != shard:
            raise FormatError(f"{index} names a file outside its folder: {shard!r}")
        if not (directory / shard).exists():
            raise FormatError(f"{directory / shard} is missing, {index.name} names it: download the model again")
        for name, entry in read_header(directory / shard).items():
            if weight_map.get(name) != shard:
                raise FormatError(
                    f"{directory / shard} holds {name!r}, which {index.name} places elsewhere or not at all"
                )
            tensors[name] = entry
    for name, shard in weight_map.items():
        if name not in tensors:
            raise FormatError(f"{directory / shard} does not hold {name!r}, which {index.name} places there")
    return tensors


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file in the order of their data.

    Raises FormatError when anything in the header contradicts the file: a length beyond its end, overlapping
    or missing ranges, sizes that are not shape × dtype, duplicate names, text that is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise FormatError(f"{path} is truncated or no safetensors file ({file_bytes} bytes)")
            raw = file.read(header_bytes)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} has a corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path} has a corrupt safetensors header: not a JSON object")
    header.pop("__metadata__", None)
    data_begin = 8 + header_bytes
    entries = sorted(
        (_check_entry(path, name, facts, data_begin, file_bytes) for name, facts in header.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    end = data_begin
    for entry in entries:
        if entry.begin != end:
            what = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
            raise FormatError(f"{path}: the data of {entry.name!r} {what}")
        end = entry.end
    if end != file_bytes:
        raise FormatError(f"{path} is truncated or padded: its tensors end at byte {end} of {file_bytes}")
    return {entry.name: entry for entry in entries}


def _refuse_duplicates(pairs: Iterable[tuple[str, Any]]) -> Json:
    result: Json = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key!r} appears twice")
        result[key] = value
    return result


def _check_entry(path: Path, name: str, facts: Any, data_begin: int, file_bytes: int) -> TensorEntry:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    shape, dtype, offsets = (
        facts.get(k) if isinstance(facts, dict) else None for k in ("shape", "dtype", "data_offsets")
    )
    if not isinstance(shape, list) or len(shape) > 64 or not all(is_size(n) for n in shape):
        raise FormatError(f"{path}: tensor {name!r} has no valid shape")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise FormatError(f"{path}: tensor {name!r} has no valid data_offsets")
    begin, end = offsets
    if begin > end or data_begin + end > file_bytes:
        raise FormatError(f"{path}: tensor {name!r} lies outside the file (bytes {begin} to {end} of its data)")
    # Python integers do not overflow: a shape of 2^60 elements cannot wrap around to the size of the range.
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise FormatError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} does not fill {end - begin} bytes"
        )
    return TensorEntry(
        name=name, file=path, dtype=dtype, shape=tuple(shape), begin=data_begin + begin, end=data_begin + end
    )


def read_tensor(entry: TensorEntry) -> npt.NDArray[Any]:
    """Read one tensor as a NumPy array of its shape; BF16, which NumPy lacks, comes as float32 (exact).

    Raises FormatError when the file shrank since its header was read, DataError for float8.
    """
    import numpy as np

    data = bytearray(entry.size_bytes)
    with entry.file.open("rb") as file:
        file.seek(entry.begin)
        if file.readinto(data) != entry.size_bytes:
            raise FormatError(f"{entry.file} changed while it was read: tensor {entry.name!r} is cut short")
    if entry.dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry.shape)
    if entry.dtype not in _NUMPY_DTYPES:
        raise DataError(f"{entry.file}: tensor {entry.name!r} is {entry.dtype}, which NumPy cannot hold")
    return np.frombuffer(data, _NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)


def map_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Map one safetensors file into memory and return its tensors as read-only views.

    Raises FormatError as `read_header` does, DataError for a dtype that NumPy cannot hold.
    """
    import numpy as np

    entries = read_header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, entry in entries.items():
        if entry.dtype not in _NUMPY_DTYPES:
            raise DataError(f"{path}: tensor {name!r} is {entry.dtype}, which NumPy cannot hold")
        flat = np.asarray(data[entry.begin : entry.end])
        tensors[name] = flat.view(_NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors


def checkpoint_sha256(directory: Path) -> str:
    """Return the fingerprint of a model: SHA-256 over the full content of its weight files and its config.

    It reads every byte, shards in parallel. It depends on file names and sharding, not on the folder's place.
    Raises as `open_checkpoint` does.
    """
    from concurrent.futures import ThreadPoolExecutor

    checkpoint = open_checkpoint(directory)
    files = sorted((*checkpoint.files, directory / "config.json"), key=lambda path: path.name)
    with ThreadPoolExecutor(max_workers=min(len(files), len(os.sched_getaffinity(0)))) as pool:
        hashes = list(pool.map(sha256_file, files))
    return sha256_json({path.name: digest for path, digest in zip(files, hashes)})


def hub_id(model: str) -> tuple[str, str | None]:
    """Split `owner/name@revision` into the hub's id and the branch, tag or commit, None where it names none."""
    name, _, revision = model.partition("@")
    return name, revision or None


def hub_commit(directory: Path) -> str | None:
    """Return the commit of a model that lies in the hub's cache, None for any other directory."""
    in_cache = directory.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", directory.name)
    return directory.name if in_cache else None


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """Return the directory of a local model, or of a hub id, `owner/name` or `owner/name@revision`, which it downloads.

    Downloaded are weights, unless told not, and what is small: configuration, tokenizer, template, code.
    Raises DataError when there is no such directory and the hub has, or can be asked for, no such id.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith("."):
        raise DataError(f"model {model} does not exist: give a directory with config.json and safetensors, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        name, revision = hub_id(model)
        wanted = [*_SMALL_FILES, *["*.safetensors"] * weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, RuntimeError, HFValidationError) as error:
        raise DataError(
            f"model {model} is neither a directory nor a hub id that can be had ({first_line(error)})"
        ) from error
