"""How training went: losses, rate and memory of every target and of the control."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from fusechat.artifact import MANIFEST, PROVENANCE, Json, read_json
from fusechat.errors import FormatError
from fusechat.layout import MULTI, SFT, TRAINING_LOG, Layout
from fusechat.ledger import read_ledger
from fusechat.report.names import source_names

MAX_POINTS = 200
_LOGGING_STEPS = 10  # of a target without a log of its own
_CURVE = ("step", "loss", "hard_loss", "soft_loss", "tokens_per_second", "held_out_bits_per_byte")


def training(layout: Layout, config: Json) -> Json:
    """Return every target's curve; raises FormatError when none is trained."""
    settings = config.get("train", {})
    targets = [MULTI] if settings.get("mode") == "multi" else source_names(config)
    names = [*targets, *([SFT] if settings.get("sft_control", True) else [])]
    others = sorted(path.parent.name for path in layout.target("*").parent.glob(f"*/{PROVENANCE}"))
    done = [name for name in dict.fromkeys([*names, *others]) if name in others]
    if not done:
        raise FormatError(f"no target is trained yet: {layout.target('*')} is not there")
    ends = {line["stage"]: line for line in read_ledger(layout.ledger) if line["event"] == "end"}
    n_tokens = _n_tokens(layout.store("pivot") / MANIFEST)
    return {
        "hard_weight": settings.get("hard_weight"),
        "by_target": {name: _target(layout.target(name), ends.get(f"train {name}", {}), n_tokens) for name in done},
        "absent": [name for name in names if name not in done],
    }


def _n_tokens(manifest: Path) -> int | None:
    return sum(shard["n_tokens"] for shard in read_json(manifest)["shards"]) if manifest.exists() else None


def _target(directory: Path, took: Json, n_tokens: int | None) -> Json:
    facts = read_json(directory / PROVENANCE)
    points = _points(directory / TRAINING_LOG, facts)
    losses = [point for point in points if "loss" in point]
    rates = [point["tokens_per_second"] for point in points if point.get("tokens_per_second")]
    seconds = took.get("seconds")
    return {
        "n_dialogues": facts["n_dialogues"],
        "source_share": facts.get("source_share"),
        "steps": points[-1]["step"] if (directory / TRAINING_LOG).exists() and points else took.get("done"),
        "seconds": seconds,
        "tokens_per_second": statistics.median(rates) if rates else _rate(facts, n_tokens, seconds),
        "peak_memory_bytes": took.get("peak_memory_bytes"),
        "peak_device_bytes": took.get("peak_device_bytes"),
        "first_loss": losses[0]["loss"] if losses else None,
        "last_loss": losses[-1]["loss"] if losses else None,
        "curve": _thinned([{key: point[key] for key in _CURVE if key in point} for point in points]),
    }


def _points(log: Path, facts: Json) -> list[Json]:
    if not log.exists():
        return [{"step": max(1, i * _LOGGING_STEPS), "loss": loss} for i, loss in enumerate(facts.get("losses", []))]
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]


def _rate(facts: Json, n_tokens: int | None, seconds: float | None) -> float | None:
    """Tokens of all passes over the time of the whole stage, loading and saving with it."""
    settings: dict[str, Any] = facts["request"]["train"]
    passes = settings["epochs"]
    if settings["max_steps"] > 0:
        passes = settings["max_steps"] * settings["batch_size"] / max(facts["n_dialogues"], 1)
    return passes * n_tokens / seconds if n_tokens and seconds else None


def _thinned(points: list[Json]) -> list[Json]:
    """Keep at most MAX_POINTS of a curve, its last among them."""
    stride = -(-len(points) // MAX_POINTS) if points else 1
    return points[::-1][::stride][::-1]
