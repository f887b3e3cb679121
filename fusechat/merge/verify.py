"""Whether a merged model on disk is still what the merge wrote."""

from __future__ import annotations

from pathlib import Path

from fusechat.artifact import read_json, sha256_file
from fusechat.errors import FormatError
from fusechat.merge.output import FORMAT, PROVENANCE


def verify(out: Path) -> int:
    """Check every file of a merge against its checksum and return how many there are.

    Raises FormatError naming the first file that is missing, cut short or changed.
    """
    provenance = read_json(out / PROVENANCE)
    if not isinstance(provenance, dict) or provenance.get("format") != FORMAT:
        raise FormatError(f"{out} is no merge of ours: its {PROVENANCE} says otherwise")
    for note in provenance["files"]:
        path = out / note["file"]
        if not path.exists():
            raise FormatError(f"{path} is missing: merge again")
        if path.stat().st_size != note["size_bytes"]:
            raise FormatError(f"{path} has {path.stat().st_size} bytes instead of {note['size_bytes']}: merge again")
        if sha256_file(path) != note["sha256"]:
            raise FormatError(f"{path} has changed since it was written (SHA-256): merge again")
    return len(provenance["files"])
