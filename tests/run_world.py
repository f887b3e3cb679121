"""A small run on the tiny world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_run(world: Any, out: Path) -> Path:
    """Write the YAML of a run to `out` beside it and return its path."""
    values = {
        "pivot": str(world.pivot),
        "sources": [str(world.source)],
        "data": {"train": str(world.dialogues), "held_out_fraction": 0.25},
        "out": str(out),
        "seed": 3,
        "extract": {"top_k": 4, "shard_dialogues": 4, "max_length_tokens": 200},
        "train": {
            "epochs": 2, "batch_size": 6, "micro_batch_size": 3, "learning_rate": 1e-3, "save_steps": 2,
            "hard_weight": 0.5,
        },
        "eval": {"bootstrap_samples": 100},
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path
