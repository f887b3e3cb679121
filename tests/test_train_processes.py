"""Training on two processes: the same losses and weights as on one, clean ends, and exact resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_world import make_stores

import fusechat
from fusechat.dialogue import load_dialogues
from fusechat.train.batches import StepBatches
from fusechat.train_config import parse_train

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["epochs=2", "batch_size=8", "micro_batch_size=2", "learning_rate=1e-3", "warmup_ratio=0", "logging_steps=1"]
LORA = ["lora.rank=4", "lora.target_modules=[q_proj,v_proj]"]


@pytest.fixture(scope="module")
def stores(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dialogues = load_dialogues(tiny_world.dialogues)[:22]  # the last step of an epoch is not whole
    return make_stores(tiny_world, dialogues, tmp_path_factory.mktemp("stores"))


def _command(world: Any, stores: Path, out: Path, *settings: str) -> list[str]:
    places = ["--pivot-store", str(stores / "pivot"), "--aligned", str(stores / "aligned"), "--out", str(out)]
    return ["-m", "fusechat", "train", str(world.pivot), *places, "--", *SETTINGS, "select=source", *settings]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def _run(launcher: list[str], command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=_environment() | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _losses(target: Path) -> list[float]:
    return list(json.loads((target / "provenance.json").read_text())["losses"])


def _assert_same(one: Path, other: Path, tolerance: float) -> None:
    assert _losses(one) == pytest.approx(_losses(other), rel=tolerance)
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=tolerance * 20)


@pytest.fixture(scope="module")
def single(tiny_world: Any, stores: Path) -> dict[str, Path]:
    """What one process makes, full and LoRA."""
    made = {}
    for name, settings in (("full", []), ("lora", LORA)):
        made[name] = stores / f"single-{name}"
        config = parse_train([*SETTINGS, "select=source", *settings])
        fusechat.train(str(tiny_world.pivot), stores / "pivot", stores / "aligned", made[name], config)
        assert len(_losses(made[name])) == 6
    return made


@pytest.fixture(scope="module")
def two(tiny_world: Any, stores: Path) -> Path:
    """What two processes make under torchrun."""
    done = _run(TORCHRUN, _command(tiny_world, stores, stores / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    return stores / "two"


def test_ddp_gives_what_one_process_gives(single: Any, two: Path) -> None:
    _assert_same(two, single["full"], 1e-5)


@pytest.mark.slow
def test_ddp_gives_the_same_adapters(single: Any, tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    done = _run(TORCHRUN, _command(tiny_world, stores, tmp_path / "t", *LORA))
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same(tmp_path / "t", single["lora"], 1e-5)


# Sends one process a signal after a step.
STRIKE = """
import os, signal, sys
import fusechat.train.callbacks as callbacks
rank, step, number = (int(value) for value in sys.argv.pop(1).split(","))
on_step_end = callbacks.Watch.on_step_end
def struck(self, args, state, control, **rest):
    if args.process_index == rank and state.global_step == step:
        os.kill(os.getpid(), number)
    on_step_end(self, args, state, control, **rest)
callbacks.Watch.on_step_end = struck
from fusechat.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_it_resumes_exactly(
    two: Path, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    (tmp_path / "strike.py").write_text(STRIKE)
    command = _command(tiny_world, stores, tmp_path / "t", "save_steps=2")
    killed = _run(TORCHRUN, [str(tmp_path / "strike.py"), "1,3,9", *command[2:]])
    assert killed.returncode != 0
    assert not (tmp_path / "t").exists()
    assert [p.name for p in (tmp_path / "t.partial").glob("checkpoint-*")] == ["checkpoint-2"]
    stopped = _run(TORCHRUN, [str(tmp_path / "strike.py"), "1,5,15", *command[2:]])
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    line = (
        "stopped by SIGTERM after step 5 of 6, saved; to go on (under its launcher, as now with 2 processes): fusechat"
    )
    assert stopped.stderr.count(line) == 1
    assert (tmp_path / "t.partial" / "checkpoint-5" / "complete.json").exists()
    done = _run(TORCHRUN, command)
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same(tmp_path / "t", two, 0)
    log = [json.loads(line) for line in (tmp_path / "t" / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_one_process_goes_on(
    single: Any, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    """torchrun hands its SIGTERM on; what two processes saved, one resumes."""
    command = _command(tiny_world, stores, tmp_path / "t", "save_steps=100")
    launcher = subprocess.Popen(
        [sys.executable, *TORCHRUN, *command],
        env=_environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "t.partial" / "training.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.terminate()
    _, said = launcher.communicate(timeout=200)
    assert "stopped by SIGTERM after step" in said, said[-3000:]
    assert list((tmp_path / "t.partial").glob("checkpoint-*/complete.json"))
    done = _run([], command)
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same(tmp_path / "t", single["full"], 1e-5)


@pytest.mark.slow
def test_accelerate_launches_without_a_file(single: Any, tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    # Its name for torchrun; `--cpu` alone starts one process.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch = ["-m", "accelerate.commands.launch", *options, "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = _run(launch, _command(tiny_world, stores, tmp_path / "t"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "t" / "provenance.json").read_text())["processes"] == 2
    _assert_same(tmp_path / "t", single["full"], 1e-5)


# accelerate shards over devices only: on the CPU it leaves the plugin aside. This is its own branch for devices.
# Offloaded shards are pinned for a device by default, which there is none of.
FSDP_ON_CPU = """
import accelerate.state as state
from torch.distributed.fsdp import CPUOffloadPolicy
CPUOffloadPolicy.__init__.__defaults__ = (False,)
begin = state.AcceleratorState.__init__
def with_plugin(self, *args, fsdp_plugin=None, **options):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == state.DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type = state.DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type
state.AcceleratorState.__init__ = with_plugin
from fusechat.__main__ import main
main()
"""


def _fsdp(recipe: str, folder: Path, command: list[str], precision: str = "no") -> list[str]:
    """The launch of a shipped recipe on two processes of the CPU."""
    config = yaml.safe_load((ROOT / "fusechat" / "recipes" / recipe).read_text())
    config |= {"num_processes": 2, "mixed_precision": precision}
    (folder / recipe).write_text(yaml.safe_dump(config))
    (folder / "fsdp_on_cpu.py").write_text(FSDP_ON_CPU)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(folder / recipe), "--main_process_port", "0"]
    return [*launch, str(folder / "fsdp_on_cpu.py"), *command[2:]]


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_fsdp2_gives_what_one_process_gives(
    kind: str, single: Any, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    command = _command(tiny_world, stores, tmp_path / "t", *(LORA if kind == "lora" else []))
    done = _run([], _fsdp("accelerate-fsdp2.yaml", tmp_path, command))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "t" / "provenance.json").read_text())["sharding"] == "fsdp"
    _assert_same(tmp_path / "t", single[kind], 1e-5)


@pytest.mark.slow
def test_fsdp2_computes_in_half_precision(single: Any, tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    command = _command(tiny_world, stores, tmp_path / "t", "dtype=bfloat16")
    done = _run([], _fsdp("accelerate-fsdp2.yaml", tmp_path, command, "bf16"))
    assert done.returncode == 0, done.stderr[-3000:]
    losses, exact = _losses(tmp_path / "t"), _losses(single["full"])
    assert losses == pytest.approx(exact, rel=1e-2)
    assert losses != exact


@pytest.mark.slow
def test_fsdp2_resumes_exactly_with_offload_and_activation_checkpointing(
    single: Any, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    command = _command(tiny_world, stores, tmp_path / "t", "save_steps=2")
    launch = _fsdp("accelerate-fsdp2-offload.yaml", tmp_path, command)
    driver = tmp_path / "fsdp_on_cpu.py"
    driver.write_text(FSDP_ON_CPU.replace("from fusechat.__main__ import main\nmain()\n", STRIKE))
    place = launch.index(str(driver)) + 1
    killed = _run([], [*launch[:place], "1,3,9", *launch[place:]])
    assert killed.returncode != 0
    assert (tmp_path / "t.partial" / "checkpoint-2" / "complete.json").exists(), killed.stderr[-4000:]
    other = _run([], command)
    assert other.returncode == 2
    assert "was written with sharding fsdp, this run has none" in other.stderr
    done = _run([], [*launch[:place], "9,9,9", *launch[place:]])
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same(tmp_path / "t", single["full"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_what_one_process_gives(
    stage: int, single: Any, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    """Where DeepSpeed is installed; on the CPU it compiles a small library of its own first."""
    pytest.importorskip("deepspeed")
    config = yaml.safe_load((ROOT / "fusechat" / "recipes" / f"accelerate-zero{stage}.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(config))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "zero.yaml")]
    command = _command(tiny_world, stores, tmp_path / "t")
    done = _run([*launch, "--main_process_port", "0"], command, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    provenance = json.loads((tmp_path / "t" / "provenance.json").read_text())
    assert provenance["sharding"] == f"deepspeed-zero{stage}"
    _assert_same(tmp_path / "t", single["full"], 1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("n", "batch", "micro", "world"), [(22, 8, 2, 1), (22, 8, 2, 2), (7, 4, 1, 4), (5, 8, 2, 2)])
def test_every_number_of_processes_takes_the_same_steps(
    n: int, batch: int, micro: int, world: int, packing: bool
) -> None:
    lengths = [3 + (i * 7) % 11 for i in range(n)]

    def plan(rank: int, n_processes: int) -> list[list[int]]:
        sizes = {"batch_size": batch, "micro_batch_size": micro, "rank": rank, "n_processes": n_processes}
        batches = StepBatches(lengths, **sizes, seed=1, packing=packing)
        batches.set_epoch(2)
        made = list(batches)
        assert len(made) == len(batches)
        return made

    def steps(n_processes: int) -> list[list[int]]:
        ranks = [plan(rank, n_processes) for rank in range(n_processes)]
        assert len({len(r) for r in ranks}) == 1
        per_step = batch // (micro * n_processes)
        parts = [list(chain(*(r[i] for r in ranks))) for i in range(len(ranks[0]))]
        return [sorted(chain(*parts[i : i + per_step])) for i in range(0, len(parts), per_step)]

    assert steps(world) == steps(1)
    assert sorted(chain(*steps(world))) == list(range(n))
