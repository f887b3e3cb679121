"""What tests of training share: the stores of the tiny world, and a short training on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fusechat
from fusechat.records import Dialogue
from fusechat.train_config import parse_train

FAST = ["max_steps=6", "batch_size=6", "micro_batch_size=3", "learning_rate=1e-3", "warmup_ratio=0", "save_steps=2"]


def make_stores(world: Any, dialogues: Sequence[Dialogue], folder: Path) -> Path:
    """Write the stores `pivot` and `source` and their alignment `aligned` into a folder and return it."""
    for name in ("pivot", "source"):
        fusechat.extract(str(getattr(world, name)), dialogues, folder / name, top_k=5)
    fusechat.align(folder / "pivot", folder / "source", folder / "aligned")
    return folder


def train_target(world: Any, stores: Path, out: Path, *settings: str, **options: Any) -> Any:
    """Train a target with the source, by FAST and these settings, and return its provenance."""
    return fusechat.train(
        str(world.pivot), stores / "pivot", stores / "aligned", out, parse_train([*FAST, *settings]), **options
    )
