"""Whether a merged model on disk is still what the merge wrote."""

from __future__ import annotations

from pathlib import Path

from fusechat.artifact import PROVENANCE, Json, read_json, sha256_bytes, sha256_file
from fusechat.checkpoint import ITEM_BYTES, read_header
from fusechat.errors import FormatError
from fusechat.merge.native import _native
from fusechat.merge.output import FORMAT, STATISTICS


def verify(out: Path | str) -> int:
    """Check every file of a merge against its checksum and return how many there are.

    Raises FormatError naming the first file that is missing, cut short or changed; of weights, the tensor too.
    """
    out = Path(out)
    provenance = read_json(out / PROVENANCE)
    if not isinstance(provenance, dict) or provenance.get("format") != FORMAT:
        raise FormatError(f"{out} is no merge of ours: its {PROVENANCE} says otherwise")
    # Tensors are compared with the statistics, so these come first.
    for note in sorted(provenance["files"], key=lambda note: "xxh64" in note):
        path = out / note["file"]
        if not path.exists():
            raise FormatError(f"{path} is missing: merge again")
        if path.stat().st_size != note["size_bytes"]:
            raise FormatError(f"{path} has {path.stat().st_size} bytes instead of {note['size_bytes']}: merge again")
        if "xxh64" in note:
            _verify_weights(path, note, read_json(out / STATISTICS))
        elif sha256_file(path) != note["sha256"]:
            raise FormatError(f"{path} has changed since it was written (SHA-256): merge again")
    return len(provenance["files"])


def _verify_weights(path: Path, note: Json, statistics: Json) -> None:
    tensors = read_header(path)  # which refuses a length that lies
    with path.open("rb") as file:
        length = file.read(8)
        if sha256_bytes(length + file.read(int.from_bytes(length, "little"))) != note["header_sha256"]:
            raise FormatError(f"{path} has changed since it was written (SHA-256 of its header): merge again")
        for name, entry in tensors.items():
            found = _native.tensor_checksum(file.fileno(), entry.begin, entry.n_elements, ITEM_BYTES[entry.dtype])
            if f"{found:016x}" != statistics[name]["xxh64"]:
                raise FormatError(f"{path} has changed since it was written (XXH64 of tensor {name}): merge again")
