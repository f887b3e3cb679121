"""Whether a merged model on disk is still what the merge wrote."""

from __future__ import annotations

from pathlib import Path

from fusechat import _native
from fusechat.artifact import Json, read_json, sha256_file
from fusechat.checkpoint import ITEM_BYTES, open_checkpoint
from fusechat.errors import FormatError
from fusechat.merge.output import FORMAT, PROVENANCE, STATISTICS, header_sha256


def verify(out: Path) -> int:
    """Check every file of a merge against its checksum and return how many there are.

    Raises FormatError naming the first file that is missing, cut short or changed; of weights, the tensor too.
    """
    provenance = read_json(out / PROVENANCE)
    if not isinstance(provenance, dict) or provenance.get("format") != FORMAT:
        raise FormatError(f"{out} is no merge of ours: its {PROVENANCE} says otherwise")
    for note in provenance["files"]:
        _verify_file(out / note["file"], note)
    _verify_tensors(out)
    return len(provenance["files"])


def _verify_file(path: Path, note: Json) -> None:
    if not path.exists():
        raise FormatError(f"{path} is missing: merge again")
    if path.stat().st_size != note["size_bytes"]:
        raise FormatError(f"{path} has {path.stat().st_size} bytes instead of {note['size_bytes']}: merge again")
    if "header_sha256" in note:
        if header_sha256(path) != note["header_sha256"]:
            raise FormatError(f"{path} has changed since it was written (SHA-256 of its header): merge again")
    elif sha256_file(path) != note["sha256"]:
        raise FormatError(f"{path} has changed since it was written (SHA-256): merge again")


def _verify_tensors(out: Path) -> None:
    statistics = read_json(out / STATISTICS)
    for name, entry in open_checkpoint(out).tensors.items():
        with entry.file.open("rb") as file:
            found = _native.tensor_checksum(file.fileno(), entry.begin, entry.n_elements, ITEM_BYTES[entry.dtype])
        if f"{found:016x}" != statistics[name]["xxh64"]:
            raise FormatError(f"{entry.file} has changed since it was written (XXH64 of tensor {name}): merge again")
