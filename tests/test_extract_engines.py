"""Shards over several engines: nothing is lost or made twice, whatever dies; and who may write where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from extract_world import check_store, manifest, shard_bytes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fusechat
from fusechat.config import ExtractConfig
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError, DataError, FusechatError
from fusechat.extract import on_ray
from fusechat.extract.backend import device_groups, engines_of
from fusechat.extract.budget import MAX_BATCHED_TOKENS, max_batched_tokens, prompt_logprob_bytes
from fusechat.extract.child import ChildEngine
from fusechat.extract.engines import EngineLostError, run_shards
from fusechat.extract.on_ray import n_actors
from fusechat.extract.task import Shard, Task
from fusechat.extract.vllm import engine_arguments
from fusechat.ledger import Ledger, read_ledger
from fusechat.model_shape import shape_of_directory
from fusechat.plan.extraction import plan_extraction
from fusechat.plan.hardware import load_hardware
from fusechat.plan.workload import Lengths
from fusechat.records import Dialogue
from fusechat.reporter import Reporter
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer

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


def test_devices_are_divided_into_engines() -> None:
    def seen(*arguments: Any) -> list[str]:
        return [group["CUDA_VISIBLE_DEVICES"] for group in device_groups(*arguments)]

    assert seen(["0", "1", "2", "3", "4"], 2, None) == ["0,1", "2,3"]
    assert seen(["3", "GPU-aa"], 1, None) == ["3", "GPU-aa"]
    assert seen(["0", "1"], 1, 1) == ["0"]
    assert device_groups([], 1, None) == [{}]
    assert device_groups([], 1, 2) == [{}, {}]
    for wrong in ((["0"], 2, None), (["0", "1"], 1, 3)):
        with pytest.raises(ConfigError, match=r"do not fit the \d that are visible"):
            device_groups(*wrong)


@pytest.fixture
def seven_billion(tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """An extraction by vLLM of a model of 7 billion parameters of which only the config is here."""
    monkeypatch.setattr("fusechat.extract.vllm.require_vllm", lambda: None)
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = {"model_type": "mistral", "intermediate_size": 14336, "vocab_size": 32_000, "dtype": "bfloat16", **sizes}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return Task(
        model="seven", directory=tmp_path / "model", out=tmp_path / "s", config=ExtractConfig(backend="vllm"),
        template=load_template(load_tokenizer(tiny_world.pivot), "own"), vocab_size=32_000, max_length_tokens=2048,
        dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize(("gigabytes", "size"), [(6, 4), (12, 2), (24, 1), (80, 1)])
def test_a_model_is_spread_over_as_few_gpus_as_hold_it_and_the_plan_says_so(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch, gigabytes: int, size: int
) -> None:
    gpus(*["NVIDIA Z"] * 4, mebibytes=gigabytes * 1024)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    made: Any = engines_of(seven_billion, [])
    groups = [",".join("0123"[i : i + size]) for i in range(0, 4, size)]
    assert [engine.environment["CUDA_VISIBLE_DEVICES"] for engine in made] == groups
    assert {engine.task.config.tensor_parallel_size for engine in made} == {size}
    asked = seven_billion.config.model_copy(update={"tensor_parallel_size": 4})
    assert len(engines_of(replace(seven_billion, config=asked), [])) == 1
    shape, _ = shape_of_directory(seven_billion.directory)
    hardware = load_hardware(None)
    lengths = Lengths(n_dialogues=9, sample=np.full(9, 500), row_share=0.75, distinct_ids=9)
    planned = plan_extraction("seven", shape, lengths, seven_billion.config, hardware, 0)
    assert (planned.settings["tensor_parallel_size"], planned.settings["engines"]) == (size, 4 // size)
    assert planned.fits


@pytest.mark.parametrize(("share", "size"), [(0.95, 1), (0.4, 2)])
def test_run_and_plan_spread_a_model_by_the_share_of_a_gpu_that_vllm_is_given(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch, share: float, size: int
) -> None:
    """Catches an engine that is given too little of a GPU for its weights, and a plan that fits by another share."""
    gpus(*["NVIDIA Z"] * 2, mebibytes=24 * 1024)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config = seven_billion.config.model_copy(update={"engine_args": {"gpu_memory_utilization": share}})
    made: Any = engines_of(replace(seven_billion, config=config), [])
    assert {engine.task.config.tensor_parallel_size for engine in made} == {size}
    shape, _ = shape_of_directory(seven_billion.directory)
    lengths = Lengths(n_dialogues=9, sample=np.full(9, 500), row_share=0.75, distinct_ids=9)
    planned = plan_extraction("seven", shape, lengths, config, load_hardware(None), 0)
    arguments = engine_arguments(replace(seven_billion, config=config), on_cpu=False, memory_bytes=24 << 30)
    assert planned.settings["tensor_parallel_size"] == size
    for key in ("gpu_memory_utilization", "max_num_batched_tokens"):
        assert planned.settings[key] == arguments[key]
    assert planned.fits


@pytest.mark.parametrize(
    ("key", "value"),
    [("gpu_memory_utilization", 1.5), ("gpu_memory_utilization", "all"), ("max_num_batched_tokens", 0)],
)
def test_a_share_that_is_none_is_refused_before_anything_starts(seven_billion: Task, key: str, value: Any) -> None:
    config = seven_billion.config.model_copy(update={"engine_args": {key: value}})
    with pytest.raises(ConfigError, match=rf"extract\.engine_args\.{key} is {value!r}: it must be"):
        engine_arguments(replace(seven_billion, config=config), on_cpu=False, memory_bytes=24 << 30)


def test_a_store_goes_on_with_the_size_its_shards_were_made_with(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a store half of whose rows were summed over two GPUs, half over one."""
    gpus(*["NVIDIA Z"] * 4, mebibytes=80 * 1024)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    made: Any = engines_of(seven_billion, [{"name": "vllm", "tensor_parallel_size": 2}])
    assert {engine.task.config.tensor_parallel_size for engine in made} == {2}


def test_where_the_gpus_are_not_known_each_has_an_engine(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    gpus("NVIDIA Z", mebibytes=6 * 1024)
    assert len(engines_of(seven_billion, [])) == 2


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


@given(
    vocab_size=st.integers(100, 300_000), memory_gib=st.integers(1, 200), utilization=st.floats(0.3, 0.95),
    dtype_bytes=st.sampled_from([2, 4]),
)  # fmt: skip
def test_the_step_of_vllm_fits_beside_its_own_memory(
    vocab_size: int, memory_gib: int, utilization: float, dtype_bytes: int
) -> None:
    memory_bytes = memory_gib << 30
    tokens = max_batched_tokens(vocab_size, memory_bytes, dtype_bytes=dtype_bytes, utilization=utilization)
    assert 64 <= tokens <= MAX_BATCHED_TOKENS
    need = prompt_logprob_bytes(tokens, vocab_size, dtype_bytes=dtype_bytes)
    assert tokens == 64 or need <= (1 - utilization) * memory_bytes
    twice = prompt_logprob_bytes(2 * tokens, vocab_size, dtype_bytes=dtype_bytes)
    assert tokens == MAX_BATCHED_TOKENS or twice > 0.7 * (1 - utilization) * memory_bytes


def test_the_known_case_of_running_out_of_memory() -> None:
    """8,192 tokens at V = 152,064 are 7.5 GB: fine on an H200, too much beside 85 % of a 24 GiB card."""
    assert prompt_logprob_bytes(8192, 152_064) == pytest.approx(7.5e9, rel=0.01)
    assert max_batched_tokens(152_064, 139 << 30) == 8192
    assert max_batched_tokens(152_064, 24 << 30) == 2048
    assert max_batched_tokens(32_000, 24 << 30) == 8192
