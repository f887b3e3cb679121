"""transformers' Trainer with the fusion loss: hidden states at the taught rows, then head and loss in one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusechat.loss import Cells, Missing, linear_sparse_soft_ce
from fusechat.model import head, hidden_states

COMPLETE = "complete"


class FusionTrainer(Trainer):  # type: ignore[misc]
    """Trains on batches of fusechat.train.collate.collate; the loss is the mean over all rows of the optimiser step."""

    def __init__(
        self,
        *args: Any,
        missing: Missing,
        byte_order: torch.Tensor | None,
        loss_budget_bytes: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.missing = missing
        self.byte_order = byte_order
        self.loss_budget_bytes = loss_budget_bytes
        # The Trainer then counts the labels of a whole optimiser step and leaves the division to compute_loss.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return Σ row losses / rows of the optimiser step (over all processes)."""
        inner = self.accelerator.unwrap_model(model)
        hidden = hidden_states(inner, inputs["input_ids"], inputs["attention_mask"])
        rows = inputs["rows"]
        labels = inputs["labels"].flatten()[rows + 1]
        parts = head(inner)
        count = num_items_in_batch if num_items_in_batch is not None else len(rows)
        result = linear_sparse_soft_ce(
            hidden.flatten(0, 1)[rows],
            parts.weight.to(hidden.dtype),
            labels,
            inputs["target_ids"],
            inputs["target_logprobs"],
            bias=parts.bias,
            softcap=parts.softcap,
            hard_weight=inputs["hard_weight"],
            partition=inputs["partition"],
            cells=None if self.byte_order is None else self._cells(self.byte_order, inputs),
            missing=self.missing,
            row_weight=torch.ones(len(rows), device=rows.device),
            budget_bytes=self.loss_budget_bytes,
        )
        loss = result.loss / count * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    @staticmethod
    def _cells(order: torch.Tensor, inputs: dict[str, torch.Tensor]) -> Cells:
        low, high = inputs["target_low"], inputs["target_high"]
        return Cells(order=order.to(low.device), low=low, high=high)


class MarkComplete(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole once the Trainer has written all of it: a kill may leave half of one."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the mark."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_whole_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint under `directory`, removing those that a kill left half-written."""
    best: tuple[int, Path] | None = None
    for path in directory.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
            continue
        step = int(path.name.rpartition("-")[2])
        if best is None or step > best[0]:
            best = (step, path)
    return best[1] if best else None
