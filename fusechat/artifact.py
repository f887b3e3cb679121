"""Artefacts on disk: hashes, manifests, and writes that are either whole or absent.

A directory artefact is written shard by shard. While it grows, `request.json` says what it is being made from and
every finished shard has a `.json` note with its checksum beside it, one of which nothing was left a note alone;
`manifest.json` appears last, atomically, and means that the artefact is complete. A stage that was killed finds the
request, keeps the shards whose checksum holds, and goes on at the first missing one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusechat.errors import FormatError, FusechatError, MismatchError

MANIFEST = "manifest.json"
REQUEST = "request.json"
PROVENANCE = "provenance.json"
"""Beside a model's weights: what it was made from."""

LOCK = "writing.lock"
PARTIAL_SUFFIX = ".partial"
_FULL_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_NO_ROOM = ("PytorchStreamWriter failed writing", "unexpected pos", "basic_ios::clear: iostream error")

Json = dict[str, Any]


def sha256_bytes(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256_bytes(text.encode())


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; rename it into place only if the block succeeds.

    Raises FusechatError with the mend when the disk is full or the place cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise FusechatError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises FormatError naming the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist") from error
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too deep for Python
        raise FormatError(f"{path} is not valid JSON: {error}") from error


def _read_object(path: Path) -> Json:
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not ours, or damaged: remove {path.parent} or choose another place")
    return value


def read_manifest(directory: Path, expected_format: str, *, newest: int = 1) -> Json:
    """Return the manifest of a complete artefact of format version 1 to `newest`.

    Raises FormatError when the directory is missing, incomplete, of another kind, or of a newer format version.
    """
    if not directory.is_dir():
        raise FormatError(f"{directory} does not exist: run the stage that makes it first")
    if not (directory / MANIFEST).exists():
        raise FormatError(f"{directory} is not a complete artefact (no {MANIFEST}): run its stage again, it resumes")
    manifest: Json = read_json(directory / MANIFEST)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != expected_format:
        raise FormatError(f"{directory} is a {found or 'foreign'} artefact, expected {expected_format}")
    if manifest.get("version") not in range(1, newest + 1):
        readable = "version 1" if newest == 1 else f"versions 1 to {newest}"
        raise FormatError(
            f"{directory} has format version {manifest.get('version')}, this fusechat reads {readable}: "
            "remove it and run its stage again"
        )
    return manifest


def differences(ours: Json, theirs: Json) -> list[str]:
    """Name every key whose values differ between two requests, with both values, shortened."""

    def short(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 40 else text[:16] + "…" + text[-16:]

    keys = sorted(ours.keys() | theirs.keys())
    if ours.get("format") != theirs.get("format"):
        keys = ["format"]  # of another kind altogether: the rest says nothing
    return [
        f"{k}: {short(theirs.get(k))} there, {short(ours.get(k))} here" for k in keys if ours.get(k) != theirs.get(k)
    ]


class ShardedWriter:
    """Writes a directory artefact shard by shard so that an interrupted run can resume.

    Raises MismatchError when the directory already holds, whole or in part, something made from another request.
    """

    def __init__(self, directory: Path, request: Json) -> None:
        self.directory = directory
        self.request = request
        self.done: dict[str, Json] = {}
        self.empty: dict[str, Json] = {}  # the notes of shards without a file, by the name it would have
        self._lock: int | None = None
        if directory.exists() and not directory.is_dir():
            raise FormatError(f"{directory} exists and is not a directory")
        self._seen = self._state()
        if directory.is_dir() and any(directory.iterdir()):
            self._resume()

    @property
    def complete(self) -> bool:
        """Whether the artefact was finished before, from the same request."""
        return (self.directory / MANIFEST).exists()

    def _resume(self) -> None:
        if self.complete:
            found = _read_object(self.directory / MANIFEST).get("request")
        elif (self.directory / REQUEST).exists():
            found = _read_object(self.directory / REQUEST)
        elif all(entry.name == LOCK or entry.name.endswith(PARTIAL_SUFFIX) for entry in self.directory.iterdir()):
            return
        else:
            raise MismatchError(f"{self.directory} holds something that is not ours: choose another place")
        if found != self.request:
            what = "; ".join(differences(self.request, found if isinstance(found, dict) else {}))
            raise MismatchError(
                f"{self.directory} was made from other inputs ({what}): remove it or choose another place"
            )
        for note in sorted(self.directory.glob("*.safetensors.json")):
            shard = _read_object(note)
            if "file" not in shard and "skipped" in shard:
                self.empty[note.stem] = shard
                continue
            if shard.get("file") != note.stem or "sha256" not in shard:
                raise FormatError(f"{note} is not the note of a shard of ours: remove it")
            file = self.directory / shard["file"]
            if file.exists() and sha256_file(file) == shard["sha256"]:
                self.done[shard["file"]] = shard

    def _state(self) -> dict[str, int]:
        """Return the notes in the directory with the times of their writing: what another process has done shows."""
        found = {}
        for path in self.directory.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                found[path.name] = path.stat().st_mtime_ns
        return found

    def begin(self) -> bool:
        """Take the directory: state the request, and keep every other process out until `finish` or `close`.

        Takes nothing and returns False where another process has finished the same artefact since this writer looked;
        raises MismatchError where it is another one.
        """
        if self._lock is not None:
            return True
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock_directory(self.directory)
        if self._state() != self._seen:
            self.done, self.empty = {}, {}
            self._resume()
            if self.complete:
                self.close()
                return False
        if not (self.directory / REQUEST).exists():
            write_json(self.directory / REQUEST, self.request)
        return True

    def close(self) -> None:
        """Give the directory free for another process; one in which nothing was made yet goes away."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            notes = {f"{name}.json" for name in self.empty}
            if {entry.name for entry in self.directory.iterdir()} <= {LOCK, REQUEST, *notes}:
                for name in (*notes, REQUEST):
                    (self.directory / name).unlink(missing_ok=True)
            (self.directory / LOCK).unlink()
            self.directory.rmdir()  # refuses unless it is empty
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, write: Any, **facts: Any) -> None:
        """Write one shard through `write(path)` and note its checksum and `facts`."""
        self.begin()
        self.done[name] = write_shard(self.directory, name, write, **facts)

    def finish(self, **facts: Any) -> Json:
        """Write the manifest, which makes the artefact complete, and return it."""
        self.begin()
        request = dict(self.request)
        manifest = {
            "format": request.pop("format"),
            "version": request.pop("version"),
            **request,
            **facts,
            "shards": [self.done[name] for name in sorted(self.done)],
            "request": self.request,
        }
        write_json(self.directory / MANIFEST, manifest)
        for note in self.directory.glob("*.safetensors.json"):
            note.unlink()
        with contextlib.suppress(OSError):
            (self.directory / REQUEST).unlink()
        self.close()
        return manifest


def write_shard(directory: Path, name: str, write: Any, **facts: Any) -> Json:
    """Write a shard through `write(path)`, and beside it the note that it is whole, which is returned."""
    path = directory / name
    with atomic_write(path) as partial:
        write(partial)
    shard = {"file": name, "size_bytes": path.stat().st_size, "sha256": sha256_file(path), **facts}
    write_json(path.with_name(name + ".json"), shard)
    return shard


def lock_directory(directory: Path) -> int:
    """Lock a directory for writing and return the lock's descriptor.

    Raises FusechatError when another process has it, or its file system has no locks.

    A killed process's lock is gone with it; only its file stays, and is taken over.
    """
    path = directory / LOCK
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise FusechatError(
                    f"{directory} cannot be locked ({error.strerror}): choose a place on another file system"
                ) from error
            raise FusechatError(
                f"{directory} is being written by another run: wait for it, or choose another place"
            ) from error
        # The former owner may have removed the file between our opening and locking it.
        if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:
            return fd
        os.close(fd)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep every other process that asks for it out of a directory; raises FusechatError when one is in it."""
    lock = lock_directory(directory)
    try:
        yield
    finally:
        (directory / LOCK).unlink(missing_ok=True)
        os.close(lock)


def verify_shards(directory: Path, manifest: Json) -> None:
    """Check every shard's size and SHA-256 against the manifest; raises FormatError naming the shard."""
    for shard in manifest["shards"]:
        path = directory / shard["file"]
        if not path.exists():
            raise FormatError(f"{path} is missing: remove {directory} and run its stage again")
        if path.stat().st_size != shard["size_bytes"]:
            raise FormatError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {shard['size_bytes']}: "
                f"remove {directory} and run its stage again"
            )
        if sha256_file(path) != shard["sha256"]:
            raise FormatError(
                f"{path} is corrupt (its SHA-256 is not the manifest's): remove {directory} and run its stage again"
            )


@contextlib.contextmanager
def full_disk_is_named(directory: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one line; everything finished so far stays."""
    try:
        yield
    except FusechatError:
        raise
    except Exception as error:
        if shutil.disk_usage(nearest_there(directory)).free < _FULL_BYTES:
            raise FusechatError(
                f"the disk under {directory} is full: free space and run the same command again, it resumes"
            ) from error
        if _was_cut_off(error):
            raise FusechatError(
                f"a file under {directory} could not be written to its end (disk full, quota, or limit of file sizes): "
                "make room and run the same command again, it resumes"
            ) from error
        raise


def _was_cut_off(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, is a write that found no room; libraries keep only the text."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in _NO_ROOM or any(f"os error {number})" in text for number in _NO_ROOM):
            return True
        if any(said in text for said in _TORCH_NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


def nearest_there(path: Path) -> Path:
    """Return the nearest of a path and the folders around it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def require_writable(path: Path) -> None:
    """Raise FusechatError when a file or folder that is, or is to be, at `path` could not be written; makes nothing."""
    place = nearest_there(path)
    if place != path.absolute() and not place.is_dir():
        raise FusechatError(f"{path} cannot be made, for {place} is a file: choose another place")
    if not os.access(place, os.W_OK):
        raise FusechatError(f"{path} cannot be written, for {place} may not be: choose another place")


def require_free_bytes(directory: Path, needed_bytes: int) -> None:
    """Raise FusechatError when the disk under `directory` has less than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(nearest_there(directory)).free
    if free_bytes < needed_bytes:
        raise FusechatError(
            f"{directory} needs {needed_bytes / 1e6:,.1f} MB, {free_bytes / 1e6:,.1f} MB are free: "
            "free space or choose another place"
        )
