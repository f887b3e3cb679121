"""transformers' Trainer with the fusion loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from fusechat.errors import DataError
from fusechat.train.batch import TOKEN_COLUMNS, fusion_batch
from fusechat.train.batches import StepBatches
from fusechat.train.collate import collate
from fusechat.train.held_out import HeldOut, held_out_bits_per_byte
from fusechat.train.meter import Meter


class _EpochLoader(DataLoader[Any]):
    """Hands the Trainer's epoch on to the sampler of micro-batches."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class FusionTrainer(Trainer):  # type: ignore[misc]
    """Trains on a FusionDataset; the loss is the mean over all rows of the optimiser step, over all processes.

    The model's forward must be `fusechat.train.forward.install_loss`'s.
    """

    def __init__(
        self,
        *args: Any,
        batches: partial[StepBatches],
        pad_token_id: int,
        packing: bool,
        hard_weight_at: Callable[[float], float],
        held_out: HeldOut | None,
        meter: Meter,
        log_file: Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, eval_dataset=held_out, **kwargs)
        self.batches = batches
        self.collate = partial(collate, pad_token_id=pad_token_id, packing=packing)
        self.hard_weight_at = hard_weight_at
        self.held_out = held_out
        self.meter = meter
        self.log_file = log_file
        self.step_losses: list[tuple[torch.Tensor, list[int]]] = []
        # The Trainer then counts the labels of a whole optimiser step and leaves the division to compute_loss.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's micro-batches; accelerate would repeat dialogues to give all equally many."""
        sampler = self.batches(rank=self.args.process_index, n_processes=self.args.world_size)
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_num_workers > 0,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return Σ row losses / rows of the optimiser step, times the processes, whose gradients are averaged."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        batch = fusion_batch(inputs, self.hard_weight_at(progress))
        tokens = {name: inputs[name] for name in TOKEN_COLUMNS if name in inputs}
        parts = model(**tokens, batch=batch)
        count = max(num_items_in_batch, 1) if isinstance(num_items_in_batch, int) else num_items_in_batch
        loss = parts["loss"] / count * self.accelerator.num_processes
        self.meter.add(parts, inputs)
        self.step_losses.append((loss.detach(), inputs["dialogue"]))
        return (loss, parts) if return_outputs else loss

    def require_finite_losses(self) -> None:
        """Raise DataError, naming the dialogues, when a micro-batch of this step had no finite loss."""
        losses, self.step_losses = self.step_losses, []
        finite = torch.stack([torch.isfinite(loss) for loss, _ in losses]).tolist()
        for i, (_, dialogues) in enumerate(losses):
            if not finite[i]:
                raise DataError(
                    f"the loss is NaN at step {self.state.global_step + 1}, micro-batch {i + 1} of {len(losses)} "
                    f"(dialogues {', '.join(map(str, dialogues))}): lower train.learning_rate, or train in float32; "
                    "the last good checkpoint is kept, and the same command goes on there"
                )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure held-out bits per byte."""
        assert self.held_out is not None
        bpb = held_out_bits_per_byte(self.model_wrapped, self.held_out, self.accelerator, self.collate)
        metrics = {"eval_bpb": bpb}
        self.log(metrics)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self.control = control
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meter counted since the last time, and write one line of JSON."""
        if "loss" in logs:
            logs |= self.meter.read(self.accelerator, self.hard_weight_at, self.state)
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_bpb" in logs):
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(log_record(logs, self.state.global_step)) + "\n")


def log_record(logs: dict[str, Any], step: int) -> dict[str, Any]:
    """Return a line of the training log: the step first, the names of docs/training.md."""
    names = {"eval_bpb": "held_out_bits_per_byte"}
    return {"step": step} | {names.get(name, name): value for name, value in logs.items()}


def rewind_log(log_file: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write the log of a run that goes on at a checkpoint: what came after the checkpoint is computed again."""
    lines = [
        json.dumps(log_record({k: v for k, v in entry.items() if k != "step"}, entry["step"]))
        for entry in history
        if "loss" in entry or "eval_bpb" in entry
    ]
    log_file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
