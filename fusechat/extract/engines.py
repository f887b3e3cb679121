"""Shards over engines: each takes the next one when it is done, and a lost engine's shard goes to the others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack

from fusechat.artifact import Json
from fusechat.errors import FusechatError
from fusechat.extract.scores import Advance
from fusechat.extract.task import Shard, Work

log = logging.getLogger(__name__)


class EngineLostError(FusechatError):
    """An engine is gone (its process died, its endpoint stopped to answer); its shard can be made by another."""


class ShardQueue:
    """Hands out shards to several threads, and takes back what an engine could not finish."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = iter(shards)
        self._returned: list[Shard] = []
        self._under_way = 0
        self._stopped = False
        self._changed = threading.Condition()

    def take(self) -> Shard | None:
        """Return the next shard, None when all are made; waits while another engine may still give one back."""
        with self._changed:
            while not self._stopped:
                shard = self._returned.pop() if self._returned else next(self._shards, None)
                if shard is not None:
                    self._under_way += 1
                    return shard
                if not self._under_way:
                    break
                self._changed.wait()
            return None

    def done(self, unfinished: Shard | None = None) -> None:
        """Say that a shard taken is made, or give it back."""
        with self._changed:
            self._under_way -= 1
            if unfinished is not None:
                self._returned.append(unfinished)
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def run_shards(
    engines: Sequence[AbstractContextManager[Work]],
    shards: Iterable[Shard],
    *,
    note: Callable[[Shard, Json], None],
    advance: Advance,
) -> None:
    """Make every shard on whichever engine is free and call `note(shard, its note)`, one call at a time.

    Raises what an engine raised; EngineLostError when no engine is left, with the reason of each.
    """
    queue = ShardQueue(shards)
    lost: list[str] = []
    one_at_a_time = threading.Lock()

    def advance_locked(tokens: int) -> None:
        with one_at_a_time:
            advance(tokens)

    def serve(work: Work) -> None:
        while (shard := queue.take()) is not None:
            try:
                result = work(shard, advance_locked)
            except EngineLostError as error:
                queue.done(unfinished=shard)
                lost.append(str(error))
                if len(lost) == len(engines):
                    reasons = "; ".join(dict.fromkeys(lost))
                    raise EngineLostError(f"{reasons}; run the same command again, it resumes") from error
                log.warning("%s; the other engines go on", error)
                return
            except BaseException:
                queue.done()
                queue.stop()
                raise
            with one_at_a_time:
                note(shard, result)
            queue.done()

    if len(engines) == 1:  # in this thread, where an interrupt arrives at once
        with engines[0] as work:
            serve(work)
        return
    with ThreadPoolExecutor(len(engines)) as pool, ExitStack() as stack:
        stack.callback(queue.stop)
        futures = [pool.submit(serve, stack.enter_context(engine)) for engine in engines]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
