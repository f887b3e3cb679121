"""The ledger: a line when a stage begins to work and one when it is done; none for a stage that was found done."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fusechat.errors import FusechatError
from fusechat.ledger import Ledger, read_ledger
from fusechat.reporter import Advance, Reporter


class Heard(Reporter):
    def __init__(self) -> None:
        self.told: list[object] = []

    def stage(self, name: str, unit: str) -> Advance:
        self.told.append((name, unit))
        return lambda done, total: self.told.append((done, total))

    def done(self, name: str, note: str) -> None:
        self.told.append(note)


def test_a_stage_that_works_leaves_what_it_took_and_everything_is_passed_on(tmp_path: Path) -> None:
    heard = Heard()
    ledger = Ledger(heard, tmp_path / "stages.jsonl")
    advance = ledger.stage("align é", "rows")
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    time.sleep(0.05)
    advance(3, 7)
    advance(7, 7)
    ledger.done("align é", "same 82%")
    del block
    assert heard.told == [("align é", "rows"), (3, 7), (7, 7), "same 82%"]
    begin, end = read_ledger(tmp_path / "stages.jsonl")
    assert (begin["event"], begin["stage"], begin["environment"]["cores"] >= 1) == ("begin", "align é", True)
    assert (end["event"], end["done"], end["total"], end["unit"]) == ("end", 7, 7, "rows")
    assert 0.05 <= end["seconds"] < 30
    assert end["peak_memory_bytes"] > 64 << 20


def test_the_peak_is_the_stages_own(tmp_path: Path) -> None:
    ledger = Ledger(Reporter(), tmp_path / "stages.jsonl")
    for name, size_bytes in (("large", 300 << 20), ("small", 1 << 20)):
        advance = ledger.stage(name, "rows")
        block = bytearray(size_bytes)
        block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
        advance(1, 1)
        ledger.done(name, "")
        del block
    peaks = {line["stage"]: line["peak_memory_bytes"] for line in read_ledger(tmp_path / "stages.jsonl")[1::2]}
    assert peaks["large"] - peaks["small"] > 200 << 20


def test_a_stage_found_done_leaves_no_line_and_a_killed_one_its_beginning(tmp_path: Path) -> None:
    ledger = Ledger(Reporter(), tmp_path / "stages.jsonl")
    ledger.stage("extract pivot", "tokens")
    ledger.done("extract pivot", "as before")
    ledger.stage("merge", "bytes")(1, 9)
    with (tmp_path / "stages.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "end", "sta')
    assert [(line["event"], line["stage"]) for line in read_ledger(tmp_path / "stages.jsonl")] == [("begin", "merge")]
    assert read_ledger(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("cut", ['{"event": "begin", "stage": "e', '{"stage": "é'], ids=["text", "character"])
def test_what_a_kill_cut_short_takes_no_other_line_with_it(cut: str, tmp_path: Path) -> None:
    """Catches a line that is written behind the half of another, and a report that cannot read half a character."""
    path = tmp_path / "stages.jsonl"
    path.write_bytes(cut.encode()[:-1] if cut.endswith("é") else cut.encode())
    assert read_ledger(path) == []
    ledger = Ledger(Reporter(), path)
    ledger.stage("align", "rows")(1, 1)
    ledger.done("align", "1 × no\u2028template")
    assert [(line["event"], line.get("note")) for line in read_ledger(path)] == [
        ("begin", None),
        ("end", "1 × no\u2028template"),
    ]


def test_a_full_disk_is_one_line() -> None:
    """Catches a traceback from the run's own notes."""
    ledger = Ledger(Reporter(), Path("/dev/full"))
    with pytest.raises(FusechatError, match="cannot write /dev/full: No space left on device; make room"):
        ledger.stage("merge", "bytes")(1, 9)
