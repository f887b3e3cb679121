"""Shards over several engines: nothing is lost or made twice, whatever dies; and who may write where."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from extract_world import check_store, manifest, shard_bytes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fusechat
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError, DataError, FusechatError
from fusechat.extract import on_ray
from fusechat.extract.child import ChildEngine
from fusechat.extract.engines import EngineLostError, run_shards
from fusechat.extract.on_ray import n_actors
from fusechat.extract.task import Shard
from fusechat.ledger import Ledger, read_ledger
from fusechat.records import Dialogue
from fusechat.reporter import Reporter

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dialogues(tiny_world: Any) -> list[Dialogue]:
    return load_dialogues(tiny_world.dialogues)


@given(
    lifetimes=st.lists(st.integers(0, 6), min_size=1, max_size=4), n_shards=st.integers(0, 12), immortal=st.booleans()
)
def test_every_shard_is_made_once_by_whoever_lives(lifetimes: list[int], n_shards: int, immortal: bool) -> None:
    lives: list[float] = [float("inf"), *lifetimes] if immortal else list(lifetimes)

    @contextmanager
    def engine(number: int) -> Any:
        def work(shard: Shard, advance: Any) -> dict[str, Any]:
            if lives[number] <= 0:
                raise EngineLostError(f"engine {number} is gone")
            lives[number] -= 1
            advance(1)
            return {"made": shard.number}

        yield work

    made: list[int] = []
    advanced: list[int] = []
    shards = [Shard(number=i, first=i, dialogues=()) for i in range(n_shards)]

    def run() -> None:
        run_shards(
            [engine(i) for i in range(len(lives))],
            shards,
            note=lambda shard, note: made.append(note["made"]),
            advance=advanced.append,
        )

    if not immortal and sum(lifetimes) < n_shards:
        with pytest.raises(EngineLostError, match="it resumes"):
            run()
        assert len(made) == len(set(made)) == sum(lifetimes)
    else:
        run()
        assert sorted(made) == list(range(n_shards))
    assert sum(advanced) == len(made)


def test_an_error_of_the_work_itself_stops_all_engines() -> None:
    begun = threading.Event()

    @contextmanager
    def engine(number: int) -> Any:
        def work(shard: Shard, advance: Any) -> dict[str, Any]:
            if number == 0:
                begun.wait(5)
                raise DataError("the model is broken")
            begun.set()
            return {}

        yield work

    endless = (Shard(number=i, first=i, dialogues=()) for i in iter(int, 1))
    with pytest.raises(DataError, match="broken"):
        run_shards([engine(0), engine(1)], endless, note=lambda *_: None, advance=lambda n: None)


def test_one_engine_for_each_visible_device_gives_the_bytes_of_one_process(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"top_k": 5, "shard_dialogues": 4}
    fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "one", **options)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # torch finds no such device and computes on the CPU
    began: list[str] = []
    enter = ChildEngine.__enter__

    def entered(self: ChildEngine) -> Any:
        began.append(self.environment["CUDA_VISIBLE_DEVICES"])
        return enter(self)

    monkeypatch.setattr(ChildEngine, "__enter__", entered)
    seen: list[tuple[int, int]] = []
    fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "two", progress=lambda *p: seen.append(p), **options)
    assert began == ["0", "1"]
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert seen[-1][0] == seen[-1][1] == sum(s["n_tokens"] for s in manifest(tmp_path / "two")["shards"])
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.slow
def test_the_ledger_counts_what_engines_in_other_processes_use(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    """Catches a cost that is the waiting parent's: an engine loads torch alone in more than a second."""
    ledger, cpu_start = Ledger(Reporter(), tmp_path / "stages.jsonl"), time.process_time()
    advance = ledger.stage("extract pivot", "tokens")
    fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", engines=2, shard_dialogues=4, progress=advance)
    ledger.done("extract pivot", "")
    own_cpu_seconds = time.process_time() - cpu_start
    advance = ledger.stage("align source", "rows")
    advance(1, 1)
    ledger.done("align source", "")
    extract, align = (line for line in read_ledger(tmp_path / "stages.jsonl") if line["event"] == "end")
    assert extract["cpu_seconds"] > own_cpu_seconds + 2
    assert extract["peak_memory_bytes"] > align["peak_memory_bytes"] + 2 * (100 << 20)
    assert align["cpu_seconds"] < 1, "an engine of one stage counts in the next"


@pytest.mark.slow
def test_an_error_in_a_child_is_the_same_one_line(tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path) -> None:
    shutil.copytree(tiny_world.pivot, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="NaN logits on dialogue") as error:
        fusechat.extract(str(tmp_path / "nan"), dialogues, tmp_path / "s", engines=2)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="does not go to device mars"):
        fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", device="mars")
    assert not (tmp_path / "s").exists()


def test_a_child_that_is_killed_is_named_and_the_run_resumes(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    options: Any = {"top_k": 5, "shard_dialogues": 4}
    children: list[ChildEngine] = []
    enter = ChildEngine.__enter__

    def entered(self: ChildEngine) -> Any:
        children.append(self)
        return enter(self)

    def kill(done: int, total: int) -> None:
        if list((tmp_path / "s").glob("*.safetensors")):
            os.kill(children[0].process.pid, signal.SIGKILL)

    monkeypatch.setattr(ChildEngine, "__enter__", entered)
    with pytest.raises(FusechatError, match=r"died \(signal 9\): see .*it resumes"):
        fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "s", progress=kill, **options)
    made = shard_bytes(tmp_path / "s")
    assert 0 < len(made) < 6
    fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "s", **options)
    assert made.items() <= shard_bytes(tmp_path / "s").items()
    check_store(tmp_path / "s", tiny_world.source)


WRITER = """
import sys, time
from pathlib import Path
import fusechat
from fusechat.dialogue import load_dialogues
model, data, out = sys.argv[1:]
def wait(done, total):
    if list(Path(out).glob("*.safetensors")):
        print("writing", flush=True)
        time.sleep(60)
fusechat.extract(model, load_dialogues(data), Path(out), shard_dialogues=4, progress=wait)
"""


def test_a_second_process_may_not_write_the_same_store(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tiny_world.pivot), str(tiny_world.dialogues), str(tmp_path / "s")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == "writing"
        with pytest.raises(FusechatError, match="is being written by another run"):
            fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", shard_dialogues=4)
    finally:
        first.kill()
        first.wait()
    fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", shard_dialogues=4)
    assert {path.suffix for path in (tmp_path / "s").iterdir()} == {".safetensors", ".json"}


def test_a_child_ends_when_its_parent_is_killed(tiny_world: Any, tmp_path: Path) -> None:
    """Else a killed run would keep its GPU."""
    code = WRITER.replace("shard_dialogues=4", "shard_dialogues=4, engines=2").replace(
        "time.sleep(60)", "time.sleep(9)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_world.pivot), str(tiny_world.dialogues), str(tmp_path / "s")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline().strip() == "writing"
    children = [int(p) for p in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    for _ in range(100):
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists() and _state(pid) != "Z"]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow
def test_two_ray_actors_give_the_bytes_of_one_process(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fusechat[ray]'")
    options: Any = {"top_k": 5, "shard_dialogues": 4}
    fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "one", **options)
    fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "ray", ray="local", engines=2, **options)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "ray")
    one, ray = manifest(tmp_path / "one"), manifest(tmp_path / "ray")
    assert {key: value for key, value in one.items() if key != "shards"} == {
        key: value for key, value in ray.items() if key != "shards"
    }


@pytest.mark.slow
def test_engines_that_a_cluster_has_no_room_for_are_refused(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    """Catches a wait for machines that never come."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fusechat[ray]'")
    with pytest.raises(ConfigError, match=r"extract\.engines: 999 of 1 CPU each .* room for \d+"):
        fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "s", ray="local", engines=999)


@pytest.mark.parametrize(
    ("machine", "share", "engines", "actors"),
    [
        ({"CPU": 8.0}, {"cpus": 1}, None, 1),
        ({"CPU": 8.0}, {"cpus": 1}, 8, 8),
        ({"CPU": 8.0}, {"cpus": 1}, 9, "9 of 1 CPU each .* room for 8"),
        ({"CPU": 8.0, "GPU": 8.0}, {"cpus": 0, "gpus": 2}, None, 4),
        ({"CPU": 8.0, "GPU": 8.0}, {"cpus": 0, "gpus": 2}, 5, "5 of 2 GPUs each .* room for 4"),
    ],
)
def test_a_cluster_s_actors_are_as_many_as_it_has_room_for(
    machine: dict[str, float], share: dict[str, int], engines: int | None, actors: int | str
) -> None:
    cluster = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": machine}])
    if isinstance(actors, int):
        assert n_actors(cluster, engines, share) == actors
    else:
        with pytest.raises(ConfigError, match=actors):
            n_actors(cluster, engines, share)


def test_without_ray_the_mend_is_named(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"):
        fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "s", ray="local")


def test_a_cluster_without_cpus_is_told_the_mend_for_it(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches advice about GPUs where there are none."""
    empty = SimpleNamespace(cluster_resources=dict, nodes=lambda: [{"Alive": True, "Resources": {"memory": 1e9}}])
    monkeypatch.setattr(on_ray, "ray_cluster", lambda _: nullcontext(empty))
    with pytest.raises(ConfigError, match=r"1 CPUs, .*: start one with CPUs"):
        fusechat.extract(str(tiny_world.source), dialogues, tmp_path / "s", ray="local")
