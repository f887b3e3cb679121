"""The output directory while it grows: pre-sized shards, a journal of finished tensors, and what makes it a model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fusechat import __version__
from fusechat.artifact import (
    LOCK,
    PARTIAL_SUFFIX,
    PROVENANCE,
    REQUEST,
    Json,
    differences,
    lock_directory,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
)
from fusechat.errors import FusechatError, MismatchError
from fusechat.merge.layout import Shard, index_json
from fusechat.merge.native import _native
from fusechat.tokenizer import tokenizer_files

STATISTICS = "merge_stats.json"
JOURNAL = "journal.jsonl"
FORMAT = "fusechat.merge"
_BASE_FILES = ("generation_config.json", "*.py")


def existing(out: Path, request: Json) -> Json | None:
    """Return the provenance of a finished merge at `out` made from the same request, None when nothing is there.

    Raises MismatchError when `out` holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / PROVENANCE).exists():
        raise MismatchError(f"{out} exists and is no merge of ours: choose another place")
    provenance: Json = read_json(out / PROVENANCE)
    if provenance.get("request") != request:
        what = "; ".join(differences(request, provenance.get("request") or {}))
        raise MismatchError(f"{out} was merged from other inputs ({what}): remove it or choose another place")
    (out / LOCK).unlink(missing_ok=True)  # left by a kill just after the rename
    return provenance


def taken_over(base: Path, tokenizer: Path) -> list[Path]:
    """Return the files that go into a merged model as they are: the base's, and the tokenizer's."""
    return [*(path for pattern in _BASE_FILES for path in base.glob(pattern)), *tokenizer_files(tokenizer)]


def open_shard(directory: Path, shard: Shard) -> tuple[int, bool]:
    """Open a shard for writing, reserve its whole size and write its header.

    Returns its descriptor and whether it holds nothing yet; raises FusechatError when the disk is full.
    """
    path = directory / shard.name
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fresh = os.fstat(fd).st_size != shard.size_bytes
        if fresh:
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, shard.size_bytes)
        os.pwrite(fd, shard.header, 0)
    except OSError as error:
        raise FusechatError(
            f"cannot write {path} ({shard.size_bytes} bytes): {error.strerror}; free space or choose another place"
        ) from error
    return fd, fresh


class Workplace:
    """OUT.partial: becomes OUT by a rename when everything in it is whole; until then no other process writes there."""

    def __init__(self, out: Path, request: Json, shards: Sequence[Shard]) -> None:
        self.out = out
        self.directory = out.with_name(out.name + PARTIAL_SUFFIX)
        self.request = request
        self.shards = shards
        self.finished: dict[str, Json] = {}
        self._lock: int | None = None

    def begin(self, *, resume: bool) -> Json | None:
        """Take the directory, with what another merge of the same inputs left there; one of other inputs is begun anew.

        Where the same merge has been finished meanwhile, begins nothing and returns its provenance. Raises
        MismatchError when the directory holds anything else or, if `resume`, a merge of other inputs, FusechatError
        when it cannot be written or another process writes there.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.directory)
        except OSError as error:
            reason = error.strerror or error
            raise FusechatError(f"cannot write {self.directory}: {reason}; choose another place") from error
        finished = existing(self.out, self.request)
        if finished is None:
            self._take_over(resume)
            write_json(self.directory / REQUEST, self.request)
        return finished

    def close(self) -> None:
        """Give the directory free for another process."""
        if self._lock is None:
            return
        (self.directory / LOCK).unlink(missing_ok=True)
        if self.directory != self.out:
            with contextlib.suppress(OSError):
                self.directory.rmdir()  # refuses unless nothing was begun
        os.close(self._lock)
        self._lock = None

    def _take_over(self, resume: bool) -> None:
        request, provenance = self.directory / REQUEST, self.directory / PROVENANCE
        begun = request.exists() or provenance.exists()
        # A kill before the request was whole leaves an empty folder, or its temporary file.
        found = [path for path in self.directory.iterdir() if path.name != LOCK]
        if not begun and any(path.suffix != PARTIAL_SUFFIX for path in found):
            raise MismatchError(f"{self.directory} exists and is not a merge of ours: remove it")
        if begun:
            theirs = read_json(request) if request.exists() else read_json(provenance)["request"]
            if theirs == self.request:
                self._read_journal()
                return
            if resume:
                what = "; ".join(differences(self.request, theirs))
                raise MismatchError(
                    f"{self.directory} was begun from other inputs ({what}): run without --resume to begin anew"
                )
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read_journal(self) -> None:
        journal = self.directory / JOURNAL
        if not journal.exists():
            return
        for line in journal.read_text(encoding="utf-8").splitlines():
            # A kill may leave half a line, a power failure what never reached the disk: only this boot's words count.
            try:
                note = json.loads(line)
            except json.JSONDecodeError:
                break
            if note["boot"] == _boot():
                self.finished[note["tensor"]] = note["statistics"]

    def open_shard(self, shard: Shard) -> int:
        """Open a shard for writing; returns its descriptor."""
        fd, fresh = open_shard(self.directory, shard)
        for slot in shard.slots if fresh else ():
            self.finished.pop(slot.plan.name, None)
        return fd

    def note(self, tensor: str, statistics: Json) -> None:
        """Note in the journal that a tensor is written."""
        self.finished[tensor] = statistics
        line = json.dumps({"tensor": tensor, "boot": _boot(), "statistics": statistics})
        with (self.directory / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def take_over(self, base: Path, tokenizer: Path, chat_template: str | None) -> None:
        """Copy the small files of the base and of the tokenizer, whose chat template another one may replace."""
        for path in taken_over(base, tokenizer):
            shutil.copyfile(path, self.directory / path.name)
        if chat_template is None:
            return
        (self.directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        # Where a template stood before it had a file of its own: some readers look there first.
        (self.directory / "chat_template.json").unlink(missing_ok=True)
        place = self.directory / "tokenizer_config.json"
        held = read_json(place) if place.exists() else {}
        if held.pop("chat_template", None) is not None:
            write_json(place, held)

    def finish(self, config: Json, recipe: str, card: str, facts: Json) -> Json:
        """Write everything else besides the weights, then make OUT.partial OUT; returns the provenance."""
        directory = self.directory
        if len(self.shards) > 1:
            write_json(directory / "model.safetensors.index.json", index_json(self.shards))
        write_json(directory / "config.json", config)
        write_json(directory / STATISTICS, self.finished)
        (directory / "merge.yaml").write_text(recipe, encoding="utf-8")
        (directory / "README.md").write_text(card, encoding="utf-8")
        files = []
        for path in sorted(directory.iterdir()):
            # A kill while the provenance was written leaves its temporary file.
            if path.name not in (LOCK, REQUEST, JOURNAL, PROVENANCE, PROVENANCE + PARTIAL_SUFFIX):
                note = {"file": path.name, "size_bytes": path.stat().st_size}
                shard = next((shard for shard in self.shards if shard.name == path.name), None)
                files.append(note | (self._checksums(shard) if shard else {"sha256": sha256_file(path)}))
        provenance: Json = {
            "format": FORMAT, "version": 1, "fusechat_version": __version__, **facts, "files": files,
            "request": self.request,
        }  # fmt: skip
        write_json(directory / PROVENANCE, provenance)
        for name in (REQUEST, JOURNAL):
            (directory / name).unlink(missing_ok=True)
        self.directory = self.directory.replace(self.out)
        return provenance

    def _checksums(self, shard: Shard) -> Json:
        """Return a shard's: of its header, and XXH64 over its tensors', which were hashed while they were written."""
        slots = sorted(shard.slots, key=lambda slot: slot.offset)
        tensors = b"".join(bytes.fromhex(self.finished[slot.plan.name]["xxh64"]) for slot in slots)
        return {"header_sha256": sha256_bytes(shard.header), "xxh64": f"{_native.xxh64(tensors):016x}"}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
