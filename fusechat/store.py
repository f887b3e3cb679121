"""Stores: ragged columns over dialogues, tokens and rows, in safetensors shards with one manifest.

A *row* belongs to a position t whose next token t+1 is the assistant's: the distribution of token t+1 given 0..t.

    TopKStore     dialogue.index int64[n]      place in the dataset
                  token.input_ids int32[T], token.loss_mask bool[T], token.turn int32[T], token.byte_end int32[T]
                  row.ids uint16|int32[R,K], row.logprobs float16[R,K], row.gold_logprob float32[R]
    AlignedStore  dialogue.index, dialogue.source_nll, ... (fusechat/align)
                  row.ids, row.logprobs in the pivot's ids at the pivot's rows, row.kind uint8[R], row.gold_logprob

Log-probabilities are natural and of the full softmax at temperature 1. An absent entry has id 0 and log-probability
−inf. Beside the columns a shard holds offset.token and offset.row, int64[n+1]. Later versions may add columns.
On disk the token columns and the gold log-probabilities are packed (fusechat/packing.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fusechat.artifact import MANIFEST, Json, read_json, read_manifest, verify_shards
from fusechat.checkpoint import map_tensors
from fusechat.errors import FormatError
from fusechat.packing import is_packed, pack, unpack, unpacked_names, what_does_not_fit

TOPK_FORMAT = "fusechat.topk"
TOPK_VERSION = 2  # 1 had every gold token's id and log-probability as they are, which is still read
ALIGNED_FORMAT = "fusechat.aligned"
_NEWEST = {TOPK_FORMAT: TOPK_VERSION, ALIGNED_FORMAT: 1}
MAX_UINT16_VOCAB = 65_536

Array = npt.NDArray[Any]
Axis = Literal["dialogue", "token", "row"]


def shard_name(number: int) -> str:
    """Return the file name of a store's shard."""
    return f"shard-{number:05d}.safetensors"


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype token ids are stored in: uint16 if the vocabulary has at most 65,536 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size <= MAX_UINT16_VOCAB else np.int32)


def row_positions(loss_mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the positions t that have a row: token t+1 is the assistant's (bool[T] → int64[R])."""
    return np.flatnonzero(loss_mask[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The columns of some consecutive dialogues, keyed "axis.name", with the offsets of the ragged axes."""

    columns: Mapping[str, Array]
    offsets: Mapping[str, npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.columns["dialogue.index"])

    def __getitem__(self, key: str) -> Array:
        return self.columns[key]

    def at(self, i: int) -> dict[str, Array]:
        """Return dialogue i's part of every column, as views."""
        return {key: self.column(key, i) for key in self.columns}

    def column(self, key: str, i: int) -> Array:
        """Return dialogue i's part of one column, as a view."""
        return self.columns[key][self._range(key, i)]

    def part(self, begin: int, end: int) -> Block:
        """Return dialogues begin..end as a block of views."""
        offsets = {axis: ends[begin : end + 1] - ends[begin] for axis, ends in self.offsets.items()}
        columns = {
            key: values[self._range(key, begin).start : self._range(key, end - 1).stop] if end > begin else values[:0]
            for key, values in self.columns.items()
        }
        return Block(columns=columns, offsets=offsets)

    def _range(self, key: str, i: int) -> slice:
        axis = key.partition(".")[0]
        if axis == "dialogue":
            return slice(i, i + 1)
        offsets = self.offsets[axis]
        return slice(int(offsets[i]), int(offsets[i + 1]))


def make_block(dialogues: Iterable[Mapping[str, Array]]) -> Block:
    """Concatenate per-dialogue columns, all with the same keys, into one block; raises ValueError for none."""
    records = list(dialogues)
    if not records:
        raise ValueError("a block needs at least one dialogue")
    columns = {key: np.concatenate([record[key] for record in records]) for key in records[0]}
    offsets = {}
    for axis in ("token", "row"):
        key = next((key for key in columns if key.startswith(axis + ".")), None)
        if key is not None:
            lengths = [0, *(len(record[key]) for record in records)]
            offsets[axis] = np.cumsum(lengths, dtype=np.int64)
    return Block(columns=columns, offsets=offsets)


def write_block(path: Path, block: Block) -> None:
    """Write a block as one safetensors file, packed; raises OSError when it cannot be written."""
    columns, offsets = pack(block.columns, block.offsets)
    tensors = {key: np.ascontiguousarray(values) for key, values in columns.items()}
    tensors |= {f"offset.{axis}": ends for axis, ends in offsets.items()}
    try:
        save_file(tensors, str(path))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def map_block(path: Path) -> Block:
    """Open a shard, its rows memory-mapped; raises FormatError when it is truncated, foreign or inconsistent."""
    return _unpacked(map_stored(path))


def _unpacked(block: Block) -> Block:
    if not is_packed(block.columns):
        return block
    offsets = {axis: block.offsets[axis] for axis in ("token", "row")}
    columns = unpack(block.columns, block.offsets["token"], block.offsets["turn"])
    return Block(columns=columns, offsets=offsets)


def map_stored(path: Path) -> Block:
    """Open a shard as it lies on disk; raises FormatError as `map_block` does."""
    tensors = map_tensors(path)
    columns = {name: values for name, values in tensors.items() if not name.startswith("offset.")}
    offsets = {name.partition(".")[2]: values for name, values in tensors.items() if name.startswith("offset.")}
    if "dialogue.index" not in columns:
        raise FormatError(f"{path} has no dialogue.index: it is not a shard of a store")
    n = len(columns["dialogue.index"])
    for key, values in columns.items():
        axis = key.partition(".")[0]
        ends = offsets.get(axis, np.arange(n + 1)) if axis != "dialogue" else np.arange(n + 1)
        if len(ends) != n + 1 or ends[0] != 0 or ends[-1] != len(values) or (np.diff(ends) < 0).any():
            raise FormatError(f"{path} has offsets that do not fit {key}: remove its store and run the stage again")
    wrong = what_does_not_fit(columns, offsets) if is_packed(columns) else None
    if wrong is not None:
        raise FormatError(f"{path} has {wrong} that do not fit its tokens: remove its store and run the stage again")
    return Block(columns=columns, offsets=offsets)


class Record(Mapping[str, Array]):
    """One dialogue's columns, its rows as views; what is packed is unpacked when some of it is first asked for."""

    __slots__ = ("_block", "_i", "_unpacked")

    def __init__(self, block: Block, i: int) -> None:
        self._block = block
        self._i = i
        self._unpacked: Mapping[str, Array] = {}

    def __getitem__(self, key: str) -> Array:
        block = self._block
        if key in block.columns and not (key.startswith("token.") and is_packed(block.columns)):
            return block.column(key, self._i)
        if not self._unpacked and is_packed(block.columns):
            tokens, turns = (np.diff(block.offsets[axis][self._i : self._i + 2]) for axis in ("token", "turn"))
            self._unpacked = unpack(block.at(self._i), np.append(0, tokens), np.append(0, turns))
        return self._unpacked[key]

    def __iter__(self) -> Iterator[str]:
        columns = self._block.columns
        return iter(unpacked_names(columns) if is_packed(columns) else columns)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Store:
    """Random access to a complete store by dialogue index.

    Raises FormatError when the store is missing, incomplete, or of another format, and, with `verify`, when a shard's
    size or checksum is not the manifest's.
    """

    def __init__(self, directory: Path, expected_format: str, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest: Json = store_manifest(self.directory, expected_format)
        if verify:
            verify_shards(self.directory, self.manifest)
        self._shards = [map_stored(self.directory / shard["file"]) for shard in self.manifest["shards"]]
        self._place = {
            int(index): (s, i)
            for s, shard in enumerate(self._shards)
            for i, index in enumerate(shard["dialogue.index"].tolist())
        }

    def __reduce__(self) -> Any:
        # A spawned worker maps the files itself; pickling the maps would copy them.
        return partial(Store, verify=False), (self.directory, self.manifest["format"])

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, dialogue: int) -> bool:
        return dialogue in self._place

    def __iter__(self) -> Iterator[int]:
        return iter(self._place)

    def place(self, dialogue: int) -> tuple[int, int]:
        """Return the shard that holds a dialogue and its place there; raises KeyError when this store skipped it."""
        return self._place[dialogue]

    def __getitem__(self, dialogue: int) -> Record:
        """Return the columns of one dialogue; raises KeyError when this store skipped it."""
        number, i = self._place[dialogue]
        return Record(self._shards[number], i)

    def n_tokens(self, dialogue: int) -> int:
        """Return a dialogue's number of tokens; raises KeyError when this store skipped it."""
        number, i = self._place[dialogue]
        begin, end = self._shards[number].offsets["token"][i : i + 2]
        return int(end - begin)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def shard(self, i: int) -> Block:
        """Return shard i, its rows memory-mapped."""
        return _unpacked(self._shards[i])


def store_manifest(directory: Path, expected_format: str) -> Json:
    """Return a complete store's manifest; raises FormatError for what is not one, or too new."""
    return read_manifest(directory, expected_format, newest=_NEWEST.get(expected_format, 1))


def format_of(directory: Path) -> str:
    """Return the format a complete artefact's manifest names; raises FormatError when there is none."""
    manifest = read_json(directory / MANIFEST)
    return str(manifest.get("format")) if isinstance(manifest, dict) else "foreign"


def same_vocabulary(one: Path, other: Path) -> bool:
    """Return whether two TopKStores have byte-identical vocabularies; raises FormatError when one is not complete."""
    tables = [store_manifest(directory, TOPK_FORMAT).get("tokenizer_sha256") for directory in (one, other)]
    return tables[0] is not None and tables[0] == tables[1]


def topk_beside(aligned: Path, recorded: str, name: str) -> Path:
    """Return a TopKStore that an AlignedStore was made from: where that was, or, where the folder of a whole run was
    moved, where it lies in it as before (fusechat/layout.py)."""
    there, in_run = Path(recorded), aligned.resolve().parent.parent / "extract" / name
    return in_run if in_run.exists() and not there.exists() else there


def open_topk(directory: Path, *, verify: bool = True) -> Store:
    """Open a TopKStore: one model's top-k log-probabilities."""
    return Store(directory, TOPK_FORMAT, verify=verify)


def open_aligned(directory: Path, *, verify: bool = True) -> Store:
    """Open an AlignedStore: one source's rows at the pivot's positions in the pivot's ids."""
    return Store(directory, ALIGNED_FORMAT, verify=verify)
