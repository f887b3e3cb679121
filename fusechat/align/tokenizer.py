"""A store's vocabulary: its byte table, and the tokenizer it came from. Loads no torch unless it must."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fusechat.align.vocabulary import Spelling
from fusechat.artifact import Json
from fusechat.bytetable import METASPACE, ByteTable
from fusechat.errors import DataError, MismatchError, first_line

BYTE_LEVEL_SPACE = "Ġ"
_BATCH_TEXTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A byte table with the definition of its tokenizer, the JSON of a `tokenizers.Tokenizer`, and its end tokens."""

    table: ByteTable
    definition: str
    bos_token: str | None = None
    eos_token: str | None = None

    @property
    def mark(self) -> str:
        """The character that stands for a word's leading space in the vocabulary's strings."""
        return BYTE_LEVEL_SPACE if '"ByteLevel"' in self.definition else METASPACE

    def strings(self) -> list[str]:
        """Return every id decoded alone, which is what the research code warps."""
        tokenizer = Tokenizer.from_str(self.definition)
        return tokenizer.decode_batch([[i] for i in range(len(self.table))], skip_special_tokens=False)

    def spelling(self) -> Spelling:
        """Return the vocabulary's strings as they stand in the tokenizer's file, with its special ids."""
        tokenizer = Tokenizer.from_str(self.definition)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        pieces = [""] * len(self.table)
        for piece, i in ids.items():
            pieces[i] = piece
        unknown = json.loads(self.definition)["model"].get("unk_token")
        bos, eos, unk = (None if name is None else ids.get(name) for name in (self.bos_token, self.eos_token, unknown))
        return Spelling(pieces=pieces, mark=self.mark, bos_id=bos, eos_id=eos, unk_id=unk)

    def continuation_encoder(self) -> ContinuationEncoder:
        """Return the tokenizer as it works in the middle of a text."""
        return ContinuationEncoder(self.definition)


class ContinuationEncoder:
    """Tokenizes texts as the continuation of a text: without special tokens, and without a dummy space in front."""

    def __init__(self, definition: str) -> None:
        self._tokenizer = Tokenizer.from_str(json.dumps(_continuing(json.loads(definition))))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for begin in range(0, len(texts), _BATCH_TEXTS):
            # In parts, for an Encoding is far larger than its ids.
            batch = self._tokenizer.encode_batch_fast(
                list(texts[begin : begin + _BATCH_TEXTS]), add_special_tokens=False
            )
            ids += [encoding.ids for encoding in batch]
        return ids


def _continuing(definition: Json) -> Json:
    def adapt(component: Any) -> Any:
        if not isinstance(component, dict):
            return component
        kind = component.get("type")
        if kind == "Sequence":
            inner = next(key for key in component if key != "type")
            kept = [adapt(c) for c in component[inner] if c.get("type") != "Prepend"]
            return component | {inner: kept}
        if kind == "Prepend":
            return None
        if kind == "Metaspace":
            return component | {"prepend_scheme": "never"}
        return component | {"add_prefix_space": False} if kind == "ByteLevel" else component

    stages = {stage: adapt(definition.get(stage)) for stage in ("normalizer", "pre_tokenizer")}
    added = [token for token in definition.get("added_tokens") or () if not token["special"]]
    return definition | stages | {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


class _Light:
    """A tokenizer.json with the names its configuration gives, as ByteTable.from_tokenizer wants them."""

    def __init__(self, directory: Path) -> None:
        self.name_or_path = str(directory)
        self.backend_tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        config = directory / "tokenizer_config.json"
        names = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        self.bos_token, self.eos_token = (self._content(names.get(f"{end}_token")) for end in ("bos", "eos"))

    @staticmethod
    def _content(token: Any) -> str | None:
        return token.get("content") if isinstance(token, dict) else token


def light_vocabulary(directory: Path) -> Vocabulary:
    """Load the vocabulary of a directory's tokenizer.json, or through transformers where there is none."""
    tokenizer = _load_light(directory) or _load_hub_class(directory)
    return _vocabulary(ByteTable.from_tokenizer(tokenizer), tokenizer)


def _vocabulary(table: ByteTable, tokenizer: Any) -> Vocabulary:
    return Vocabulary(
        table=table,
        definition=tokenizer.backend_tokenizer.to_str(),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


def store_vocabulary(store: Path, manifest: Json) -> Vocabulary:
    """Load the vocabulary a TopKStore was extracted with, from its model's directory.

    Raises MismatchError naming both hashes when the tokenizer found there is not the store's, DataError when there is
    none.
    """
    directory = Path(manifest["model"])
    if not directory.is_dir():
        raise DataError(f"{directory}, the model of {store}, is not there: its tokenizer is needed to align")
    found: ByteTable | None = None
    for load in (_load_light, _load_hub_class):
        tokenizer = load(directory)
        if tokenizer is None:
            continue
        found = ByteTable.from_tokenizer(tokenizer, manifest["vocab_size"])
        if found.sha256 == manifest["tokenizer_sha256"]:
            return _vocabulary(found, tokenizer)
    assert found is not None  # the second loader raises where it finds none
    raise MismatchError(
        f"the tokenizer of {directory} has SHA-256 {found.sha256}, {store} was extracted with "
        f"{manifest['tokenizer_sha256']}: restore the model's directory or extract again"
    )


def _load_light(directory: Path) -> Any:
    if not (directory / "tokenizer.json").exists():
        return None
    try:
        return _Light(directory)
    except Exception as error:  # the tokenizers package raises bare Exception
        raise DataError(f"{directory}/tokenizer.json does not load: {first_line(error)}") from error


def _load_hub_class(directory: Path) -> Any:
    from fusechat.tokenizer import load_tokenizer

    return load_tokenizer(directory)
