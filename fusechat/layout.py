"""Where a run keeps what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SFT = "sft"
"""The target that is the control."""
MULTI = "multi"
"""The one target of `train.mode: multi`."""
TRAINING_LOG = "training.jsonl"
"""In a target's folder: a line for every so many steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where a run keeps what it makes; its stores lie under `stores`, under `out` when that is None."""

    out: Path
    stores: Path | None = None

    @property
    def config(self) -> Path:
        """The run's settings, all of them."""
        return self.out / "config.yaml"

    @property
    def categories(self) -> Path:
        """The category of every dialogue that was fused on."""
        return self.out / "categories.json"

    @property
    def ledger(self) -> Path:
        """What every stage took (fusechat.ledger)."""
        return self.out / "stages.jsonl"

    @property
    def plan(self) -> Path:
        """What `fusechat plan CONFIG --json` wrote, where somebody kept it here."""
        return self.out / "plan.json"

    def store(self, name: str) -> Path:
        """The TopKStore of the pivot or of a source."""
        return (self.stores or self.out) / "extract" / name

    def aligned(self, name: str) -> Path:
        """The AlignedStore of a source."""
        return (self.stores or self.out) / "align" / name

    def target(self, name: str) -> Path:
        """The target trained with a source, or the control `sft`."""
        return self.out / "targets" / name

    @property
    def merged(self) -> Path:
        """The fused model."""
        return self.out / "merged"

    @property
    def results(self) -> Path:
        """The table of results."""
        return self.out / "results.json"

    @property
    def scores(self) -> Path:
        """What every model spent on every held-out dialogue, from which the table of results is made."""
        return self.out / "scores.json"

    @property
    def scored(self) -> Path:
        """The scores of the models that an evaluation has come to so far; gone when the results are there."""
        return self.out / "scored.json"

    @property
    def not_scored(self) -> Path:
        """Why sources have no scores, with tracebacks; absent when all have."""
        return self.out / "not_scored.log"

    @property
    def report(self) -> Path:
        """The report a person reads; its Markdown and JSON stand beside it."""
        return self.out / "report.html"
