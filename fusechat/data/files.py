"""Items out of files: JSON arrays, JSON lines, parquet, and data sets of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusechat.errors import DataError, first_line

# An item with the words that find it again: "train.jsonl line 12".
Located = tuple[str, Any]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEXT_SUFFIXES = frozenset({"", ".txt", ".text", ".md"})


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text without its byte order mark; raises DataError at the first byte that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def is_text_file(path: Path) -> bool:
    """Return whether a file holds running text rather than items."""
    return path.suffix.lower() in _TEXT_SUFFIXES


def read_items(path_or_hub_id: str | Path, *, split: str) -> Iterator[Located]:
    """Yield the items of a JSON, JSON-lines or parquet file, or of a data set (hub id or local folder).

    Raises DataError when the file is missing, malformed (with its line number) or of an unknown kind.
    """
    path = Path(path_or_hub_id)
    if path.is_dir() or (not path.exists() and _is_hub_id(path_or_hub_id)):
        return _data_set_items(str(path_or_hub_id), split)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a data file, or a hub id of the form owner/name")
    suffix = path.suffix.lower()
    if suffix in {".json", ".jsonl", ".ndjson"}:
        return _json_items(path)
    if suffix == ".parquet":
        return _parquet_items(path)
    raise DataError(f"{path} has the unknown ending {suffix!r}: expected .json, .jsonl, .parquet or .txt")


def _is_hub_id(path_or_hub_id: str | Path) -> bool:
    known_file = Path(path_or_hub_id).suffix.lower() in {".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".md"}
    return isinstance(path_or_hub_id, str) and bool(_HUB_ID.fullmatch(path_or_hub_id)) and not known_file


def _json_items(path: Path) -> Iterator[Located]:
    text = read_text(path)
    # The ending says little: many a ".json" holds one object a line.
    if text.lstrip().startswith("["):
        for number, item in enumerate(_parsed(text, path), 1):
            yield f"{path} item {number}", item
        return
    # Not splitlines(): U+2028 and its kin are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path} line {number}", _parsed(line, path, first_line=number)


def _parsed(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path} line {first_line + error.lineno - 1}"
        raise DataError(f"{place} is malformed JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise DataError(f"{path} line {first_line} cannot be read as JSON: {error}; repair or remove it") from error


def _parquet_items(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for item in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", item
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file: {error}") from error


def _data_set_items(name: str, split: str) -> Iterator[Located]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises whatever its backends raise
        raise DataError(f"cannot load the data set {name!r}, split {split!r}: {first_line(error)}") from error
    for number, item in enumerate(rows, 1):
        yield f"{name} row {number}", item
