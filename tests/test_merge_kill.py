"""A kill −9 at every write of a merge: whatever it leaves, resuming gives the bytes of a merge that ran through."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merge_family import checksums, make_family, recipe

from fusechat import _native
from fusechat.merge import merge

OPTIONS: dict[str, Any] = {"max_shard_bytes": 4000, "threads": 1}
WRITING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def _die_at(nth: int, place: Path, merged: Callable[..., Any]) -> list[int]:
    """Install, in a forked child, a counter that kills it at the nth write below `place`; returns the count so far."""
    count = [0]

    def step() -> None:
        count[0] += 1
        if count[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in WRITING or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(place) in str(arguments[0]):
            step()

    def stepped(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            step()
            return real(*args, **options)

        return wrapped

    def torn(sources: Any, n: int, **options: Any) -> Any:
        report = merged(sources, n, **options)
        if count[0] + 1 == nth and n > 1:  # half of the tensor never reached the file
            half = n * {"F32": 4, "F16": 2, "BF16": 2}[options["out_dtype"]] // 2
            real_pwrite(options["out_fd"], b"\xaa" * half, options["out_offset"] + half)
        step()
        return report

    real_pwrite = os.pwrite
    for name in ("pwrite", "fsync", "posix_fallocate", "ftruncate"):
        setattr(os, name, stepped(getattr(os, name)))
    _native.merge_tensor = torn
    sys.addaudithook(audit)
    return count


def _in_child(nth: int, config: Any, out: Path) -> int:
    """Merge in a fork that dies at its nth write; returns how many there were, or 0 when it died."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            count = _die_at(nth, out.parent, _native.merge_tensor)
            merge(config, out, **OPTIONS)
            os.write(write, count[0].to_bytes(4, "little"))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    found = os.read(read, 4)
    os.close(read)
    assert found or os.WTERMSIG(status) == signal.SIGKILL, f"write {nth}: status {status}"
    return int.from_bytes(found, "little")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_every_write_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Catches half a tensor, shard, journal line or file taken for whole, and an output that appears before it is."""
    config = recipe(make_family(tmp_path))
    whole = merge(config, tmp_path / "whole", **OPTIONS)
    expected = checksums(tmp_path / "whole")
    place = tmp_path / "killed"
    place.mkdir()
    n_writes = _in_child(1 << 30, config, place / "out")
    assert n_writes > 50
    assert checksums(place / "out") == expected
    for nth in range(1, n_writes + 1):
        shutil.rmtree(place / "out", ignore_errors=True)
        assert _in_child(nth, config, place / "out") == 0
        # After the rename only the lock's file is left to remove.
        assert not (place / "out").exists() or nth == n_writes
        assert merge(config, place / "out", **OPTIONS) == whole, f"write {nth}"
        assert checksums(place / "out") == expected, f"write {nth}"
        assert [path.name for path in place.iterdir()] == ["out"]
