"""What happens around a step and a training: progress, signals, NaN, marks on whole checkpoints, runs of W&B."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusechat.artifact import Json, read_json, write_json
from fusechat.errors import DataError, MismatchError
from fusechat.processes import rank
from fusechat.train.trainer import FusionTrainer
from fusechat.train_config import TrainConfig

COMPLETE = "complete.json"


class MarkComplete(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole once the Trainer has written all of it: a kill may leave half of one."""

    def __init__(self, facts: Json) -> None:
        self.facts = facts

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Write the mark; raises DataError instead when the weights are not finite."""
        bad = torch.zeros((), device=args.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # FSDP2's part of it, ZeRO 3's, or all.
                local = (
                    parameter.to_local()
                    if hasattr(parameter, "to_local")
                    else getattr(parameter, "ds_tensor", parameter)
                )
                bad += (~torch.isfinite(local.detach())).any().to(bad.device)
        if dist.is_initialized():
            dist.all_reduce(bad)
        if bad.item():
            raise DataError(
                f"the weights are not finite after step {state.global_step}: lower train.learning_rate, or train in "
                "float32; the last good checkpoint is kept, and the same command goes on there"
            )
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, self.facts)


def last_whole_checkpoint(directory: Path, facts: Json, *, remove: bool) -> Path | None:
    """Return the newest complete checkpoint under `directory`; `remove` those that a kill left half-written.

    Raises MismatchError when it was written under another way of sharding than `facts` says.
    """
    best: tuple[int, Path] | None = None
    for path in directory.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            if remove:
                shutil.rmtree(path)
            continue
        step = int(path.name.rpartition("-")[2])
        if best is None or step > best[0]:
            best = (step, path)
    if best is None:
        return None
    found = read_json(best[1] / COMPLETE)
    if found != facts:
        raise MismatchError(
            f"{best[1]} was written with sharding {found.get('sharding')}, this run has {facts['sharding']}: launch it "
            "as before, or remove the checkpoint"
        )
    return best[1]


def follow_a_moved_folder(checkpoint: Path) -> None:
    """Let the checkpoint's state name the best one where it lies now: its paths are of where the run began."""
    place = checkpoint / "trainer_state.json"
    state = read_json(place)
    best = state.get("best_model_checkpoint")
    here = best and str(checkpoint.parent / Path(best).name)
    if here != best:
        write_json(place, state | {"best_model_checkpoint": here})


class Watch(TrainerCallback):  # type: ignore[misc]
    """Tells progress, stops at NaN, saves and stops at a signal, and measures the held-out set at the last step."""

    def __init__(self, trainer: FusionTrainer, progress: Callable[[int, int], None] | None) -> None:
        self.trainer = trainer
        self.progress = progress
        self.asked: signal.Signals | None = None
        """The signal that asked to stop."""
        self.stopped_by: signal.Signals | None = None
        """The signal that stopped all processes, after a whole step."""
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Catch SIGTERM and SIGINT from here on, where Python lets handlers be set: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker has the handler, too: the step that is to be finished needs it
        if number == signal.SIGINT:
            if self.asked is signal.SIGINT:
                raise KeyboardInterrupt
            if rank() == 0:  # not by print, which this may have interrupted
                os.write(2, b"\nfusechat: stops after this step and saves; Ctrl-C again stops at once\n")
        self.asked = signal.Signals(number)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the signals be what they were."""
        self.release()

    def release(self) -> None:
        """Give the signals back, also after an error."""
        while self._before:
            signal.signal(*self._before.popitem())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop before a NaN reaches the weights."""
        self.trainer.require_finite_losses()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report, and stop after a whole step if any process was asked to."""
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.trainer.held_out is not None
            control.should_log = True
            return
        asked = int(self.asked or 0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # All must stop after the same step and for the same reason, whenever each heard of it.
            number = torch.tensor(asked, device=args.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            asked = int(number.item())
        if asked:
            self.stopped_by = signal.Signals(asked)
            control.should_save = control.should_training_stop = True


@contextmanager
def wandb_run_of_its_own(config: TrainConfig) -> Iterator[None]:
    """End the run of W&B that the Trainer begins, unless one was open before: W&B drops the steps that the next target
    would log into it, for they are below this one's last."""
    if "wandb" not in config.report_to:
        yield
        return
    import wandb

    callers = wandb.run
    try:
        yield
    finally:
        if callers is None:
            wandb.finish()
