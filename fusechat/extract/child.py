"""An engine in a process of its own, which gives its GPU back when it ends.

The child is started as a command, not forked or spawned by multiprocessing, so that it never runs the caller's script
again. It leads a process group of its own; when the parent is gone, or wants it gone, the whole group ends, the
engine's own processes with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from fusechat.artifact import Json
from fusechat.errors import FusechatError, first_line
from fusechat.extract.engines import EngineLostError
from fusechat.extract.scores import Advance
from fusechat.extract.task import Shard, Task, Work
from fusechat.usage import count_engine, group_usage

_ROOT = Path(__file__).resolve().parents[2]
_START = "import sys; sys.path.append({root!r}); from fusechat.extract.child import serve; serve({fd})"


class ChildEngine:
    """A context manager that gives the function making shards in a child process.

    `environment` is added to this process's. What the child prints goes to `log_path`, which is removed when all went
    well. Errors of the backend are raised here; a child that dies raises EngineLostError.
    """

    def __init__(self, task: Task, *, environment: Mapping[str, str], log_path: Path) -> None:
        self.task = task
        self.environment = environment
        self.log_path = log_path

    def __enter__(self) -> Work:
        ours, theirs = socket.socketpair()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with theirs, self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START.format(root=str(_ROOT), fd=theirs.fileno())],
                env={**os.environ, **self.environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.connection.send(self.task)
        self.count = count_engine()
        return self.work

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.connection.close()
        try:
            self.process.wait(timeout=None if kind is None else 0)
        except subprocess.TimeoutExpired:
            _end_group(self.process.pid)
            self.process.wait()
        _end_group(self.process.pid)
        if kind is None:
            self.log_path.unlink(missing_ok=True)

    def work(self, shard: Shard, advance: Advance) -> Json:
        """Make one shard; raises what the backend raised, or EngineLostError when the process died."""
        try:
            self.connection.send(shard)
            while True:
                kind, value = self.connection.recv()
                if kind == "advance":
                    advance(value)
                elif kind == "failed":
                    raise value
                else:
                    note: Json
                    note, used = value
                    self.count(used)
                    return note
        except (EOFError, OSError) as error:
            code = self.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise EngineLostError(
                f"the {self.task.config.backend} engine of {self.task.model} died ({how}): see {self.log_path}"
            ) from error


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def serve(fd: int) -> None:
    """Make the shards that arrive on a socket until it closes: what the child process runs."""
    from fusechat.extract.backend import open_scorer
    from fusechat.extract.task import open_work

    connection = Connection(fd)
    task: Task = connection.recv()
    shards: queue.Queue[Shard | None] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(connection, shards, busy), daemon=True).start()
    try:
        with open_work(task, open_scorer) as work:
            parts = multiprocessing.active_children()
            threading.Thread(target=_watch, args=(parts, busy), daemon=True).start()
            while (shard := shards.get()) is not None:
                busy.set()
                note = work(shard, lambda tokens: connection.send(("advance", tokens)))
                busy.clear()
                connection.send(("done", (note, group_usage())))
    except FusechatError as error:
        connection.send(("failed", type(error)(str(error))))
    except Exception as error:
        import traceback

        traceback.print_exc()
        connection.send(("failed", _unexpected(task, error)))


def _listen(connection: Connection[Any, Any], shards: queue.Queue[Shard | None], busy: threading.Event) -> None:
    while True:
        try:
            shards.put(connection.recv())
        except (EOFError, OSError):
            shards.put(None)
            if busy.is_set():  # nobody waits for the result any more
                _end_group(os.getpgid(0))
            return


def _watch(parts: Sequence[Any], busy: threading.Event) -> None:
    """End the group when a process of the engine dies under work: vLLM may wait for its core for ever (0.32 does)."""
    while True:
        time.sleep(0.5)
        if busy.is_set() and not all(part.is_alive() for part in parts):
            print("a process of the engine died", file=sys.stderr, flush=True)
            _end_group(os.getpgid(0))


def _unexpected(task: Task, error: Exception) -> FusechatError:
    why = f"{type(error).__name__}: {first_line(error)}"
    return FusechatError(f"the {task.config.backend} engine of {task.model} failed: {why}")
