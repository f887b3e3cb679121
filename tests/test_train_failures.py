"""What goes wrong while training, and how it ends: one line, nothing half-written, the last good checkpoint kept."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from train_world import FAST, train_target
from transformers import TrainingArguments

import fusechat
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError, DataError, FusechatError, Interrupted, MismatchError, Stopped
from fusechat.train import fit
from fusechat.train_config import parse_train

ROOT = Path(__file__).resolve().parents[1]


def _checksum(target: Path) -> dict[str, Any]:
    return {name: tensor.tobytes() for name, tensor in load_file(target / "model.safetensors").items()}


@pytest.fixture(scope="module")
def whole(tiny_world: Any, stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "t"
    train_target(tiny_world, stores, out)
    return out


SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """Tests that a shell runs in its background inherit SIGINT ignored, and so would their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "kind"), zip(SIGNALS, (Stopped, Interrupted), strict=True))
def test_a_signal_saves_and_the_same_call_goes_on(
    number: signal.Signals, kind: type[Stopped], tiny_world: Any, stores: Path, whole: Path, tmp_path: Path
) -> None:
    def strike(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), number)

    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(kind, match=f"stopped by {number.name} after step 3 of 6, saved"):
        train_target(tiny_world, stores, tmp_path / "t", progress=strike)
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert not (tmp_path / "t").exists()
    train_target(tiny_world, stores, tmp_path / "t")
    assert _checksum(tmp_path / "t") == _checksum(whole)


def test_a_second_process_does_not_train_in_the_same_place(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    """Catches two that write checkpoints into one folder, of which the slower ends without it."""
    (tmp_path / "t.partial").mkdir()
    code = (
        "import sys, pathlib, fusechat.artifact as a; a.lock_directory(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "t.partial")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FusechatError, match=r"t\.partial is being written by another run: wait for it"):
            train_target(tiny_world, stores, tmp_path / "t", "max_steps=1")
        other.kill()
    train_target(tiny_world, stores, tmp_path / "t", "max_steps=1")
    assert not (tmp_path / "t" / "writing.lock").exists()
    assert not (tmp_path / "t.partial").exists()


def test_a_second_interruption_stops_at_once(tiny_world: Any, stores: Path, whole: Path, tmp_path: Path) -> None:
    def strike(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        train_target(tiny_world, stores, tmp_path / "t", progress=strike)
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert [p.name for p in (tmp_path / "t.partial").glob("checkpoint-*")] == ["checkpoint-2"]
    train_target(tiny_world, stores, tmp_path / "t")
    assert _checksum(tmp_path / "t") == _checksum(whole)


def test_training_in_a_thread_leaves_the_signals_alone(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    """Catches handlers set where Python forbids it, which ends the training of a notebook's or a server's thread."""
    thread = threading.Thread(target=train_target, args=(tiny_world, stores, tmp_path / "t", "max_steps=1"))
    thread.start()
    thread.join()
    assert (tmp_path / "t" / "provenance.json").exists()


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        (["SIGTERM"], 0, "stopped by SIGTERM after step 1 of 6, saved; to go on: fusechat {command}"),
        (["SIGINT"], 130, "stopped by SIGINT after step 1 of 6, saved; to go on: fusechat {command}"),
        (["SIGINT", "SIGINT"], 130, "fusechat: interrupted; the same command goes on where it stopped"),
    ],
)
def test_the_command_line_ends_a_stop_with_the_line_to_resume(
    numbers: list[str], code: int, said: str, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    struck = "".join(f"    os.kill(os.getpid(), signal.{number})\n" for number in numbers)
    script = (
        "import os, signal, sys\nimport fusechat.train.callbacks as callbacks\n"
        "begin = callbacks.Watch.on_train_begin\n"
        f"def struck(self, *a, **k):\n    begin(self, *a, **k)\n{struck}"
        "callbacks.Watch.on_train_begin = struck\nfrom fusechat.__main__ import main\nmain()"
    )
    command = ["train", str(tiny_world.pivot), "--pivot-store", str(stores / "pivot"), "--out", str(tmp_path / "t")]
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--", *FAST],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    assert said.format(command=" ".join(command)) in done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_trains_on_one_gpu(
    tiny_world: Any, stores: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Catches the Trainer's nn.DataParallel, which deals out the tokens of a batch but not what they teach."""

    def as_on_gpus(**options: Any) -> TrainingArguments:
        return TrainingArguments(**options | {"use_cpu": False})

    def refused(*_: Any) -> None:
        raise AssertionError("the model was wrapped for several GPUs")

    monkeypatch.setattr(fit, "TrainingArguments", as_on_gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", refused)
    fit._tell_of_idle_gpus.cache_clear()
    for name in ("t", "again"):
        train_target(tiny_world, stores, tmp_path / name)
        assert _checksum(tmp_path / name) == _checksum(whole)
    assert caplog.text.count("3 GPUs are visible and this process trains on one") == 1
    assert "torchrun --nproc-per-node 3 -m fusechat" in caplog.text


def test_a_nan_names_step_and_dialogues_and_keeps_the_last_good_checkpoint(
    tiny_world: Any, stores: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusechat.train import forward

    own, calls = forward.head_loss, []

    def poisoned(*args: Any) -> Any:
        parts = own(*args)
        calls.append(1)
        return {k: v * float("nan") for k, v in parts.items()} if len(calls) == 6 else parts

    with monkeypatch.context() as patch:
        patch.setattr(forward, "head_loss", poisoned)
        with pytest.raises(DataError, match=r"NaN at step 3, micro-batch 2 of 2 \(dialogues \d+, \d+, \d+\): lower"):
            train_target(tiny_world, stores, tmp_path / "t")
    assert [p.name for p in (tmp_path / "t.partial").glob("checkpoint-*")] == ["checkpoint-2"]
    train_target(tiny_world, stores, tmp_path / "t")
    assert _checksum(tmp_path / "t") == _checksum(whole)


def test_weights_that_are_not_finite_are_no_checkpoint(
    tiny_world: Any, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusechat.train import callbacks

    own = callbacks.MarkComplete.on_save

    def broken(self: Any, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if state.global_step == 4:
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("inf")
        own(self, args, state, control, model=model, **rest)

    monkeypatch.setattr(callbacks.MarkComplete, "on_save", broken)
    with pytest.raises(DataError, match="the weights are not finite after step 4"):
        train_target(tiny_world, stores, tmp_path / "t")
    marked = [p.parent.name for p in (tmp_path / "t.partial").glob("checkpoint-*/complete.json")]
    assert marked == ["checkpoint-2"]


def test_a_full_disk_in_a_checkpoint_is_one_line_and_resumes(
    tiny_world: Any, stores: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusechat import artifact
    from fusechat.train.trainer import FusionTrainer

    own = FusionTrainer._save_optimizer_and_scheduler

    def full(self: Any, place: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(self, place)

    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "_save_optimizer_and_scheduler", full)
        patch.setattr(artifact.shutil, "disk_usage", lambda _: Usage(1, 1, 0))
        with pytest.raises(FusechatError, match=r"disk under .* is full: free space and run the same command again"):
            train_target(tiny_world, stores, tmp_path / "t")
    train_target(tiny_world, stores, tmp_path / "t")
    assert _checksum(tmp_path / "t") == _checksum(whole)


def test_other_settings_do_not_resume_a_checkpoint(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    def strike(done: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train_target(tiny_world, stores, tmp_path / "t", progress=strike)
    with pytest.raises(MismatchError, match=r"learning_rate: 0\.001 there, 0\.002 here"):
        train_target(tiny_world, stores, tmp_path / "t", "learning_rate=2e-3")
    mark = next((tmp_path / "t.partial").glob("checkpoint-*/complete.json"))
    mark.write_text(json.dumps({"sharding": "fsdp"}))
    with pytest.raises(MismatchError, match=r"sharding fsdp, this run has none: launch it\b"):
        train_target(tiny_world, stores, tmp_path / "t")


def test_a_limit_of_file_sizes_in_a_checkpoint_is_one_line_and_resumes(
    tiny_world: Any, stores: Path, whole: Path, tmp_path: Path
) -> None:
    """The operating system's own refusal, with free space on the disk."""
    limit = 1024 * (os.path.getsize(tiny_world.pivot / "model.safetensors") // 1024 + 20)  # the optimiser is larger
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(FusechatError, match="could not be written to its end"):
            train_target(tiny_world, stores, tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "t.partial").glob("checkpoint-*/complete.json"))
    train_target(tiny_world, stores, tmp_path / "t")
    assert _checksum(tmp_path / "t") == _checksum(whole)


def test_a_run_that_does_not_fit_goes_on_with_smaller_micro_batches(
    tiny_world: Any, stores: Path, whole: Path, tmp_path: Path
) -> None:
    def strike(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train_target(tiny_world, stores, tmp_path / "t", progress=strike)
    less = ["micro_batch_size=1", "gradient_checkpointing=true", "save_steps=1", "save_total_limit=1"]
    made = train_target(tiny_world, stores, tmp_path / "t", *less)
    assert made["request"]["train"]["micro_batch_size"] == 1
    ours, theirs = load_file(tmp_path / "t" / "model.safetensors"), load_file(whole / "model.safetensors")
    for name, weight in ours.items():
        np.testing.assert_allclose(weight, theirs[name], atol=2e-5)
    assert (
        train_target(tiny_world, stores, tmp_path / "t")["losses"] == made["losses"]
    )  # it is there: nothing is trained


def test_a_folder_moved_while_training_still_knows_its_best_checkpoint(
    tiny_world: Any, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusechat.train import trainer

    held_out = load_dialogues(tiny_world.dialogues)[:4]
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])  # the second step is the best, and comes before the move
    monkeypatch.setattr(trainer, "held_out_bits_per_byte", lambda *_: next(scores))

    def strike(done: int, total: int) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = ["final=best", "save_steps=1"]
    with pytest.raises(Stopped):
        train_target(tiny_world, stores, tmp_path / "here" / "t", *settings, held_out=held_out, progress=strike)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = train_target(tiny_world, stores, tmp_path / "there" / "t", *settings, held_out=held_out)
    assert moved["measured"]["best_step"] == 2
    two_steps = load_file(tmp_path / "there" / "t" / "model.safetensors")
    scores = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    train_target(tiny_world, stores, tmp_path / "one", *settings, held_out=held_out)
    one_step = load_file(tmp_path / "one" / "model.safetensors")
    assert any((two_steps[name] != one_step[name]).any() for name in one_step)


def test_upstream_targets_are_of_stores_without_ranges(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    settings = parse_train([*FAST, "compat=upstream", "missing=renormalise", "max_steps=1"])
    given = str(tiny_world.pivot), stores / "pivot"
    with pytest.raises(ConfigError, match="upstream knows no ranges of tokens: align with another granularity"):
        fusechat.train(*given, stores / "aligned", tmp_path / "refused", settings)
    fusechat.align(stores / "pivot", stores / "source", tmp_path / "aligned", granularity="first")
    assert fusechat.train(*given, tmp_path / "aligned", tmp_path / "t", settings)["source_share"] > 0


def test_the_device_s_memory_running_out_names_what_to_change(
    tiny_world: Any, stores: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusechat.train import forward

    def too_large(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(forward, "head_loss", too_large)
        with pytest.raises(FusechatError, match=r"out of memory at step 1 .*train.micro_batch_size.*goes on"):
            train_target(tiny_world, stores, tmp_path / "t")
    train_target(tiny_world, stores, tmp_path / "t", "micro_batch_size=1")


def test_a_store_of_another_pivot_or_tokenizer_is_refused(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.pivot, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    name = next(iter(weights))
    save_file(
        weights | {name: weights[name] + np.float32(1)}, tmp_path / "other" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(MismatchError, match="was extracted from another pivot"):
        fusechat.train(str(tmp_path / "other"), stores / "pivot", None, tmp_path / "t", parse_train(FAST))
    shutil.copytree(tiny_world.pivot, tmp_path / "respelt")
    definition = json.loads((tmp_path / "respelt" / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    one, other = (piece for piece, i in vocab.items() if i in (60, 61))
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (tmp_path / "respelt" / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(MismatchError, match="was tokenised by another tokenizer"):
        fusechat.train(str(tmp_path / "respelt"), stores / "pivot", None, tmp_path / "t", parse_train(FAST))
    assert not (tmp_path / "t.partial").exists()


def test_a_dry_run_takes_two_steps_and_leaves_nothing(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    made = train_target(tiny_world, stores, tmp_path / "t", dry_run=True, held_out=load_dialogues(tiny_world.dialogues))
    assert len(made["losses"]) == 2
    assert made["n_dialogues"] == 2
    assert not list(tmp_path.iterdir())
