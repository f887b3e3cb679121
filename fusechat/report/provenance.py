"""Where everything comes from: settings, models and data by their hashes, machine and versions."""

from __future__ import annotations

from pathlib import Path

import yaml

from fusechat.artifact import MANIFEST, PROVENANCE, Json, read_json
from fusechat.layout import Layout
from fusechat.ledger import read_ledger
from fusechat.report.names import source_names

_HASHES = ("model_sha256", "tokenizer_sha256", "template_sha256")


def provenance(layout: Layout, config: Json) -> Json:
    """Return settings, hashes of what went in, hashes of what came out, machines and versions."""
    names = ["pivot", *source_names(config)]
    environments = []
    for line in read_ledger(layout.ledger):
        if "environment" in line and line["environment"] not in environments:
            environments.append(line["environment"])
    return {
        "settings": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "models": {name: _store(layout.store(name) / MANIFEST) for name in names},
        "dataset_fingerprint": _fingerprint(layout, names),
        "held_out_fingerprint": _held_out(layout),
        "merged": _merged(layout.merged / PROVENANCE),
        "environments": environments,
    }


def _store(manifest: Path) -> Json | None:
    if not manifest.exists():
        return None
    facts = read_json(manifest)
    return {
        "model": facts["model"],
        **{key: facts[key] for key in _HASHES},
        **{key: facts[key] for key in ("backend", "dtype", "top_k", "vocab_size", "n_dialogues")},
        "n_tokens": sum(shard["n_tokens"] for shard in facts["shards"]),
        "n_rows": sum(shard["n_rows"] for shard in facts["shards"]),
        "skipped": len(facts["skipped"]),
        "cut": len(facts["cut_turns"]),
    }


def _fingerprint(layout: Layout, names: list[str]) -> str | None:
    for name in names:
        manifest = layout.store(name) / MANIFEST
        if manifest.exists():
            return str(read_json(manifest)["dataset_fingerprint"])
    return None


def _held_out(layout: Layout) -> str | None:
    if not layout.results.exists():
        return None
    return str(read_json(layout.results)["request"]["held_out_fingerprint"])


def _merged(path: Path) -> Json | None:
    if not path.exists():
        return None
    facts = read_json(path)
    # SHA-256 in merges of before XXH64 was written.
    weights = [
        {"file": file["file"], "checksum": f"XXH64 {file['xxh64']}" if "xxh64" in file else f"SHA-256 {file['sha256']}"}
        for file in facts.get("files", [])
        if file["file"].endswith(".safetensors")
    ]
    return {"fusechat_version": facts.get("fusechat_version"), "files": weights}
