"""What a run tells while it works."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[int, int], None]


class Reporter:
    """What a run tells while it works; this one is silent."""

    def stage(self, name: str, unit: str) -> Advance:
        """Begin a stage and return the function that is told (done, all) in `unit`."""
        return lambda done, total: None

    def done(self, name: str, note: str) -> None:
        """Say that a stage is finished, with one line about its result."""
