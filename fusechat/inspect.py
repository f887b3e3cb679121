"""What an artefact is: its kind, its manifest, and a readable sample."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.artifact import MANIFEST, PROVENANCE, REQUEST, Json, read_json
from fusechat.bytetable import ByteTable
from fusechat.checkpoint import resolve_model
from fusechat.errors import FormatError
from fusechat.layout import Layout
from fusechat.readable import decoded, readable
from fusechat.store import ALIGNED_FORMAT, TOPK_FORMAT, Store, open_topk, row_positions, topk_beside
from fusechat.tokenizer import load_tokenizer

_NO_LINE = (
    "request", "shards", "skipped", "losses", "groups", "merged_to", "not_scored", "merges", "nll", "content_bytes",
    "categories",
)  # fmt: skip


def describe(path: Path) -> tuple[str, Json]:
    """Return what the artefact at `path` is, in a word, and its manifest.

    Raises FormatError when it is nothing this project makes.
    """
    if path.is_file() and path.suffix == ".json":
        value = read_json(path)
        if isinstance(value, dict) and str(value.get("format", "")).startswith("fusechat."):
            return value["format"], value
    for name in (MANIFEST, PROVENANCE):
        if (path / name).exists():
            manifest = read_json(path / name)
            return str(manifest.get("format", "unknown")), manifest
    if (path / REQUEST).exists():
        return "unfinished", read_json(path / REQUEST)
    if (path / "config.json").exists():
        return "model", read_json(path / "config.json")
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    if Layout(out=path).config.exists():
        raise FormatError(
            f"{path} is the folder of a run: `fusechat report {path}` tells of it; inspect what lies in it, such as "
            f"{path}/results.json"
        )
    raise FormatError(f"{path} is not an artefact of fusechat: expected a store, a target, a merge, a model or results")


def sample_rows(store: Store, dialogue: int | None = None, limit: int = 12) -> list[list[str]]:
    """Return up to `limit` rows of one dialogue as text: position, last token, gold token, kind, best ids with p.

    Raises FormatError when the store lacks the dialogue.
    """
    manifest = store.manifest
    chosen = next(iter(store)) if dialogue is None else dialogue
    if chosen not in store:
        raise FormatError(f"{store.directory} has no dialogue {chosen}: it was skipped or is out of range")
    record = store[chosen]
    if manifest["format"] == TOPK_FORMAT:
        table, tokens = _table(manifest["model"], manifest["vocab_size"]), record
    else:
        pivot = open_topk(topk_beside(store.directory, manifest["pivot_store"], "pivot"), verify=False)
        table, tokens = _table(pivot.manifest["model"], pivot.manifest["vocab_size"]), pivot[chosen]
    input_ids = tokens["token.input_ids"]
    kinds = record.get("row.kind")
    lines = []
    for r, t in enumerate(row_positions(tokens["token.loss_mask"])[:limit].tolist()):
        logprobs = record["row.logprobs"][r].astype(np.float32)
        best = [k for k in np.argsort(-logprobs)[:4].tolist() if np.isfinite(logprobs[k])]
        top = "  ".join(f"{_shown(table, int(record['row.ids'][r][k]))!r} {np.exp(logprobs[k]):.2f}" for k in best)
        lines.append(
            [
                str(t),
                repr(_shown(table, int(input_ids[t]))),
                repr(_shown(table, int(input_ids[t + 1]))),
                _kind_name(int(kinds[r])) if kinds is not None else "",
                top,
            ]
        )
    return lines


def _shown(table: ByteTable, token_id: int) -> str:
    return readable(decoded(table.token(token_id)))


def _table(model: str, vocab_size: int) -> ByteTable:
    return ByteTable.from_tokenizer(load_tokenizer(resolve_model(model)), vocab_size)


def _kind_name(kind: int) -> str:
    from fusechat.align import RowKind

    return str(RowKind(kind).name.lower())


def summary(kind: str, manifest: Json) -> dict[str, str]:
    """Return the facts of a manifest worth a line each, as text, without lists of shards and requests."""
    facts = {key: value for key, value in manifest.items() if key not in _NO_LINE}
    if kind in (TOPK_FORMAT, ALIGNED_FORMAT):
        shards = manifest["shards"]
        facts["shards"] = len(shards)
        facts["size_bytes"] = sum(shard["size_bytes"] for shard in shards)
        for count in ("n_dialogues", "n_rows", "n_tokens"):
            if shards and count in shards[0]:
                facts[count] = sum(shard[count] for shard in shards)
    if "skipped" in manifest:
        reasons = Counter(manifest["skipped"].values())
        facts["skipped"] = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(5)) or "no dialogue"
    return {name: _as_text(name, value) for name, value in facts.items()}


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_as_text(key, part)}" for key, part in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value[:16] + "…" if name.endswith(("sha256", "fingerprint")) and value else str(value)
