"""A merge that was begun before, or elsewhere: kept, resumed to the same bytes, or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from merge_family import SHAPES, checksums, make_family, random_tensors, recipe, write_model

from fusechat.errors import FusechatError, MismatchError
from fusechat.merge import driver, merge
from fusechat.merge.verify import verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and three targets in different dtypes and shardings."""
    return make_family(tmp_path)


def test_a_finished_merge_is_kept_and_another_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches work done twice, and a result that is overwritten or taken for another's."""
    out = tmp_path / "out"
    first = merge(recipe(family), out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert merge(recipe(family), out) == first
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match="parameters"):
        merge(recipe(family, parameters={"select_topk": 0.4}), out)
    write_model(family["a"], random_tensors(9), shards=3)
    with pytest.raises(MismatchError, match="targets_sha256"):
        merge(recipe(family), out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match="no merge of ours"):
        merge(recipe(family), tmp_path / "other")


KILLER = """
import os, signal, sys
from pathlib import Path
import yaml
import fusechat.merge.output as output
from fusechat.merge import merge
moment, recipe, out = sys.argv[1:]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
calls = 0
def after(real, nth):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == nth:
            die()
        return real(*args, **kwargs)
    return wrapped
if moment.startswith("note"):
    output.Workplace.note = after(output.Workplace.note, int(moment[4:]))
elif moment.startswith("shard"):
    output.Workplace.open_shard = after(output.Workplace.open_shard, int(moment[5:]))
elif moment.startswith("json"):
    output.write_json = after(output.write_json, int(moment[4:]))
elif moment == "rename":
    real = Path.replace
    Path.replace = lambda self, target: die() if Path(target).name == "out" else real(self, target)
merge(yaml.safe_load(recipe), Path(out), max_shard_bytes=2000)
"""


@pytest.mark.parametrize("moment", ["note1", "note4", "note9", "shard1", "shard3", "json2", "json3", "json5", "rename"])
def test_a_killed_merge_resumes_to_the_same_bytes(family: dict[str, Path], tmp_path: Path, moment: str) -> None:
    """Catches half-written tensors taken for whole, and an output that appears before it is complete."""
    whole = merge(recipe(family), tmp_path / "whole", max_shard_bytes=2000)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, moment, yaml.safe_dump(recipe(family)), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    assert merge(recipe(family), out, max_shard_bytes=2000) == whole
    assert checksums(out) == checksums(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


WRITER = """
import sys, time
from pathlib import Path
import yaml
from fusechat.merge import merge
def wait(done, total):
    print("writing", flush=True)
    time.sleep(60)
merge(yaml.safe_load(sys.argv[1]), Path(sys.argv[2]), progress=wait)
"""


def test_a_second_process_may_not_write_the_same_merge(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches two merges into one folder, the first of which publishes what the second has begun to remove."""
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, yaml.safe_dump(recipe(family)), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == "writing"
        before = sorted(path.name for path in (tmp_path / "out.partial").iterdir())
        for resume in (False, True):
            with pytest.raises(FusechatError, match="is being written by another run"):
                merge(recipe(family), out, resume=resume)
        assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == before
    finally:
        first.kill()
        first.wait()
    merge(recipe(family), tmp_path / "plain")
    merge(recipe(family), out)
    assert checksums(out) == checksums(tmp_path / "plain")
    assert not (tmp_path / "out.partial").exists()


def test_a_merge_that_another_has_finished_meanwhile_is_returned(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a merge made twice, and a traceback of the rename, when two start at once and one is done before the
    other has the lock."""
    real, done = driver.existing, []

    def overtaken(out: Path, request: Any) -> Any:
        found = real(out, request)
        if not done:
            done.append("begun")
            done.append(merge(recipe(family), out))
        return found

    monkeypatch.setattr(driver, "existing", overtaken)
    found = merge(recipe(family), tmp_path / "out")
    assert found == done[1]
    assert not (tmp_path / "out.partial").exists()
    assert verify(tmp_path / "out") > 5


@pytest.mark.parametrize("resume", [False, True])
def test_a_stopped_merge_goes_on_at_its_first_missing_tensor(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """Catches hours of work that the same command, with or without --resume, removes before it begins again."""
    merged: list[str] = []
    real = driver.merge_one

    def counted(job: Any, plan: Any, *place: int) -> Any:
        if len(merged) == 4:
            merged.append("")
            raise KeyboardInterrupt
        merged.append(plan.name)
        return real(job, plan, *place)

    monkeypatch.setattr(driver, "merge_one", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(recipe(family), out, max_shard_bytes=2000, resume=resume)  # a kill may come before anything was begun
    whole = merge(recipe(family), tmp_path / "whole", max_shard_bytes=2000)
    del merged[5:]
    assert merge(recipe(family), out, max_shard_bytes=2000, resume=resume) == whole
    assert sorted(filter(None, merged)) == sorted(SHAPES), "each tensor once"
    assert checksums(out) == checksums(tmp_path / "whole")


def test_resume_refuses_changed_inputs_and_a_new_merge_begins_anew(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a continuation with other parameters."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "request.json").write_text(json.dumps({"format": "fusechat.merge", "merge_method": "linear"}))
    (partial / "model.safetensors").write_bytes(b"old")
    with pytest.raises(MismatchError, match='merge_method: "linear" there, "sce" here'):
        merge(recipe(family), tmp_path / "out", resume=True)
    merge(recipe(family), tmp_path / "out")
    assert verify(tmp_path / "out") > 5
