"""The models of a merge, opened by their headers and checked against the base before anything is written."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.artifact import Json, sha256_bytes, sha256_json
from fusechat.checkpoint import ITEM_BYTES, Checkpoint, TensorEntry, open_checkpoint, resolve_model
from fusechat.errors import DataError, FusechatError
from fusechat.merge.adapter import Adapter, open_adapter
from fusechat.merge.config import ModelRef, Vocab

if TYPE_CHECKING:  # a merge without adapters needs no NumPy
    import numpy as np
    import numpy.typing as npt

FLOATS = ("F32", "F16", "BF16")
_HEAD = "lm_head.weight"
# Causal masks and rotary frequencies, which old versions of transformers saved and no version reads: name, and rank.
_DERIVED = (
    (re.compile(r"\.(attn|attention)\.bias$"), 4),
    (re.compile(r"\.(attn|attention)\.masked_bias$"), 0),
    (re.compile(r"\.rotary_emb\.inv_freq$"), 1),
)
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One input: its reference, its checkpoint, and its adapter if it has one."""

    ref: ModelRef
    checkpoint: Checkpoint
    adapter: Adapter | None

    def entry(self, name: str) -> TensorEntry | None:
        """Return where a tensor lies; a tied head is found in the embedding."""
        found = self.checkpoint.tensors.get(name)
        if found is None and name == _HEAD and is_tied(self.checkpoint.config):
            return next((self.checkpoint.tensors[e] for e in _EMBEDDINGS if e in self.checkpoint.tensors), None)
        return found

    def low_rank(
        self, name: str, begin: int, n: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], float] | None:
        """Return the adapter's update of a tensor's items [begin, begin + n), which are whole rows, if it has one."""
        found = self.adapter.low_rank(name) if self.adapter else None
        if found is None:
            return None
        a, b, scale = found
        columns = a.shape[1]
        return a, b[begin // columns : (begin + n) // columns], scale

    def identity(self) -> Json:
        """Return what recognises this input cheaply: its config, headers, sizes and modification times."""
        files = []
        for path in (*self.checkpoint.files, *(self.adapter.files if self.adapter else ())):
            state = path.stat()
            files.append([path.name, state.st_size, state.st_mtime_ns])
        layout = sorted((e.name, e.dtype, list(e.shape), e.begin) for e in self.checkpoint.tensors.values())
        config = sha256_bytes((self.checkpoint.directory / "config.json").read_bytes())
        adapter = self.adapter.config_sha256 if self.adapter else None
        return {"sha256": sha256_json([files, layout, config, adapter])}


def is_tied(config: Json) -> bool:
    """Return whether a model's head is its embedding."""
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))


def vocab_size(config: Json) -> int | None:
    """Return the vocabulary size a config states."""
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _is_derived(entry: TensorEntry) -> bool:
    """Return whether a tensor is one that the model computes anew from its config."""
    return any(pattern.search(entry.name) and len(entry.shape) == rank for pattern, rank in _DERIVED)


def open_model(ref: ModelRef) -> Model:
    """Open a model's weights, from the hub if it is no directory, and its adapter; raises DataError or FormatError."""
    checkpoint = open_checkpoint(resolve_model(ref.model))
    weights = {name: entry for name, entry in checkpoint.tensors.items() if not _is_derived(entry)}
    checkpoint = replace(checkpoint, tensors=weights)
    adapter = open_adapter(resolve_model(ref.adapter), checkpoint) if ref.adapter else None
    return Model(ref=ref, checkpoint=checkpoint, adapter=adapter)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """Rows beyond the base's vocabulary: the range of items, and which targets have them."""

    begin: int
    end: int
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """One output tensor; `copy` marks integers and the like, which must be equal in all models."""

    name: str
    base: TensorEntry
    targets: tuple[TensorEntry, ...]
    shape: tuple[int, ...]
    dtype: str
    copy: bool
    extras: tuple[Extra, ...] = ()

    @property
    def n(self) -> int:
        """The number of elements the base has."""
        return self.base.n_elements


def match_tensors(base: Model, targets: list[Model], out_dtype: str | None, vocab: Vocab) -> list[TensorPlan]:
    """Pair every tensor of the base with the targets'; raises DataError for what does not fit, naming both sides."""
    for target in targets:
        _refuse_strangers(base, target)
    plans = []
    for name, entry in base.checkpoint.tensors.items():
        found = []
        for target in targets:
            theirs = target.entry(name)
            if theirs is None:
                raise DataError(
                    f"{target.ref} has no tensor {name}, which the base {base.ref} has: not the same architecture"
                )
            found.append(theirs)
        copy = entry.dtype not in FLOATS
        if not copy and any(theirs.dtype not in FLOATS for theirs in found):
            other = next(theirs for theirs in found if theirs.dtype not in FLOATS)
            raise DataError(
                f"{other.file}: tensor {name} is {other.dtype}: only float32, float16, bfloat16 can be merged"
            )
        shape: tuple[int, ...] = entry.shape
        extras: tuple[Extra, ...] = ()
        if any(theirs.shape != entry.shape for theirs in found):
            shape, extras = _vocabulary(name, base, targets, found, vocab)
        dtype = entry.dtype if copy else out_dtype or entry.dtype
        plans.append(TensorPlan(
            name=name, base=entry, targets=tuple(found), shape=shape, dtype=dtype, copy=copy, extras=extras,
        ))  # fmt: skip
    return plans


def _refuse_strangers(base: Model, target: Model) -> None:
    for name in target.checkpoint.tensors.keys() - base.checkpoint.tensors.keys():
        # A tied model may store its head a second time; the base's layout decides what is written.
        if name == _HEAD and is_tied(base.checkpoint.config) and is_tied(target.checkpoint.config):
            continue
        untied = " (its head is its own, the base's is tied to the embedding)" if name == _HEAD else ""
        raise DataError(
            f"{target.ref} has a tensor {name} the base {base.ref} lacks{untied}: not the same architecture"
        )


def _vocabulary(
    name: str, base: Model, targets: list[Model], found: list[TensorEntry], vocab: Vocab
) -> tuple[tuple[int, ...], tuple[Extra, ...]]:
    """Decide the shape of a tensor whose rows are the vocabulary and differ in number."""
    entry = base.checkpoint.tensors[name]
    for target, theirs in zip(targets, found):
        rows_are_vocabulary = (
            len(entry.shape) >= 1
            and theirs.shape[1:] == entry.shape[1:]
            and len(theirs.shape) == len(entry.shape)
            and entry.shape[0] == vocab_size(base.checkpoint.config)
            and theirs.shape[0] == vocab_size(target.checkpoint.config)
        )
        if theirs.shape != entry.shape and not rows_are_vocabulary:
            shapes = f"{list(theirs.shape)} in {target.ref}, {list(entry.shape)} in the base {base.ref}"
            raise DataError(f"tensor {name} has different shapes: {shapes}")
        if theirs.shape != entry.shape and vocab == "error":
            raise DataError(
                f"{name}: {target.ref} has {theirs.shape[0]} rows of vocabulary, the base {base.ref} {entry.shape[0]}: "
                "set `vocab: base` to keep the base's (missing rows count as unchanged, further rows are left out) "
                "or `vocab: pad` to keep the longest"
            )
    if vocab == "base":
        return entry.shape, ()
    width = math.prod(entry.shape[1:])
    rows = [theirs.shape[0] for theirs in found]
    bounds = sorted({entry.shape[0], *(r for r in rows if r > entry.shape[0])})
    extras = tuple(
        Extra(begin=low * width, end=high * width, targets=tuple(j for j, r in enumerate(rows) if r >= high))
        for low, high in pairwise(bounds)
    )
    return (bounds[-1], *entry.shape[1:]), extras


class Handles:
    """Opens each input file once for reading, and tells the kernel what will be read next."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._fds: dict[Path, int] = {}

    def fd(self, path: Path) -> int:
        """Return the file's descriptor."""
        if path not in self._fds:
            try:
                self._fds[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise FusechatError(f"{path} cannot be read: {error.strerror}") from error
            self._stack.callback(os.close, self._fds[path])
        return self._fds[path]

    def read_ahead(self, entries: list[TensorEntry]) -> None:
        """Ask the kernel to fetch these tensors."""
        for entry in entries:
            os.posix_fadvise(self.fd(entry.file), entry.begin, entry.size_bytes, os.POSIX_FADV_WILLNEED)


def engine_source(model: Model, entry: TensorEntry, handles: Handles, begin: int, n: int) -> tuple[Any, ...]:
    """Return the engine's view of a model's tensor, from item `begin` on, n items at most."""
    item = ITEM_BYTES[entry.dtype]
    valid = max(0, min(entry.n_elements - begin, n))
    low_rank = model.low_rank(entry.name, begin, valid)
    return (handles.fd(entry.file), entry.begin + begin * item, entry.dtype, valid, low_rank)


def zeros_source(n: int) -> tuple[Any, ...]:
    """Return the engine's word for a tensor of zeros."""
    return (-1, 0, "F32", n, None)


def open_models(base: ModelRef, targets: Sequence[ModelRef]) -> tuple[Model, list[Model]]:
    """Open all models of a merge, each directory once."""
    opened: dict[ModelRef, Model] = {}
    for ref in (base, *targets):
        if ref not in opened:
            opened[ref] = open_model(ref)
    return opened[base], [opened[ref] for ref in targets]
