"""An append-only file of JSON lines: every row is on disk as soon as it is known, so nothing is ever paid for twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from fusechat.artifact import Json
from fusechat.errors import FormatError, FusechatError

log = logging.getLogger(__name__)


def read_rows(path: Path) -> list[Json]:
    """Return the rows of a file of JSON lines; raises FormatError naming the line that is no JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist") from error
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path} cannot be read as JSON lines: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_row(line, f"{path} line {number}"))
    return rows


def _row(line: str, where: str) -> Json:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, or too deep or too long a number for Python
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise FormatError(f"{where} is {type(row).__name__}, expected a JSON object")
    return row


class Journal:
    """What `open_journal` gives: the rows that were there, and `append`, which may be called from any thread."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.rows = read_rows(path)
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def append(self, *rows: Json) -> None:
        """Write rows at the end, all or none of them, and have the disk take them; raises FusechatError."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with self._lock:
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            try:
                written = os.write(self._descriptor, data)
                if written < len(data):
                    os.write(self._descriptor, data[written:])  # raises what stopped the first write
                os.fsync(self._descriptor)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, end)
                raise FusechatError(f"cannot write {self.path}: {error.strerror}; free space and run again") from error
            self.rows.extend(rows)


@contextlib.contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open or create a journal for this process alone.

    A last line that a kill has cut is removed. Raises FusechatError when another process has it open or the place
    cannot be written, FormatError when a line is no JSON object.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise FusechatError(f"cannot write {path}: {error.strerror}; choose another place") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FusechatError(f"{path} is being written by another process: wait for it") from error
        _drop_cut_line(path, descriptor)
        yield Journal(path, descriptor)
    finally:
        os.close(descriptor)


def _drop_cut_line(path: Path, descriptor: int) -> None:
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    start = data.rfind(b"\n") + 1
    try:
        json.loads(data[start:])
    except ValueError:
        log.warning("%s: its last line was cut when the writing stopped, and is done again", path)
        os.ftruncate(descriptor, start)
    else:
        os.write(descriptor, b"\n")
