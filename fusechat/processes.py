"""The processes of one run, as torchrun and accelerate launch name them in the environment. Loads no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def rank() -> int:
    """Return this process's number, 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def n_processes() -> int:
    """Return how many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_until(ready: Callable[[], bool], every_seconds: float = 1.0) -> None:
    """Wait for what another process makes; if that one fails, the launcher ends this one."""
    while not ready():
        time.sleep(every_seconds)


def first_does(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 while the others wait, and return its result everywhere.

    When it raises, rank 0 raises it and the others leave quietly with exit code 2.
    """
    if n_processes() == 1:
        return action()
    import torch.distributed as dist

    outcome: list[Any] = [None, True]
    error: BaseException | None = None
    if rank() == 0:
        try:
            outcome = [action(), True]
        except BaseException as raised:
            error, outcome = raised, [None, False]
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if not outcome[1]:
        raise SystemExit(2)
    return outcome[0]
