"""Held-out bits per byte during training, of the model as it is wrapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusechat.artifact import Json
from fusechat.bytetable import ByteTable
from fusechat.encode import encode_all
from fusechat.errors import DataError
from fusechat.loss import IGNORE_LABEL
from fusechat.records import Dialogue
from fusechat.store import row_positions
from fusechat.template import load_template
from fusechat.train.batch import TOKEN_COLUMNS, fusion_batch
from fusechat.train.dataset import Example
from fusechat.train.targets import Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Dialogues in the pivot's tokens, those of one length together, with the bytes of what the assistant says."""

    examples: list[Example]
    content_bytes: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.examples)


def encode_held_out(
    dialogues: Sequence[Dialogue], tokenizer: Any, table: ByteTable, manifest: Json, batch_size: int
) -> HeldOut:
    """Encode dialogues as the pivot's store was; those that would have to be cut are left out.

    Raises DataError when none is left.
    """
    encodings = encode_all(
        dialogues,
        tokenizer,
        table,
        template=load_template(tokenizer, manifest["template"].removeprefix("pivot:")),
        max_length_tokens=manifest["max_length_tokens"],
    )
    examples, content_bytes = [], 0
    for index, encoded in zip(encodings.index, encodings.encoded):
        if index in encodings.cut_turns:
            continue
        rows = row_positions(encoded.loss_mask)
        examples.append(
            Example(
                dialogue=index,
                input_ids=encoded.input_ids.astype(np.int64),
                labels=np.where(encoded.loss_mask, encoded.input_ids, IGNORE_LABEL).astype(np.int64),
                rows=rows,
                targets=Targets.nothing(len(rows)),
                taught=np.zeros(len(rows), np.float32),
                row_weight=np.ones(len(rows), np.float32),
                origin=np.zeros(len(rows), np.int64),
            )
        )
        content_bytes += dialogues[index].answer_bytes
    if not content_bytes:
        raise DataError("no held-out dialogue fits the pivot's context: use shorter ones")
    examples.sort(key=lambda e: len(e.input_ids))
    return HeldOut(examples=examples, content_bytes=content_bytes, batch_size=batch_size)


@torch.no_grad()
def held_out_bits_per_byte(
    model: Any, held_out: HeldOut, accelerator: Any, collate: Callable[[Sequence[Example]], dict[str, Any]]
) -> float:
    """Return Σ −log₂ p / bytes over all dialogues, each process scoring its share."""
    was_training = model.training
    model.eval()
    size, world = held_out.batch_size, accelerator.num_processes
    n_batches = math.ceil(len(held_out) / size)
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for first in range(0, n_batches, world):
        begin = (first + accelerator.process_index) * size
        # Beyond the end a process scores an empty batch: all must call the model equally often.
        inputs = collate(held_out.examples[begin : begin + size])
        inputs = {k: v.to(accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        tokens = {name: inputs[name] for name in TOKEN_COLUMNS if name in inputs}
        total += model(**tokens, batch=fusion_batch(inputs, 1.0))["hard"].double()
    model.train(was_training)
    return float(accelerator.reduce(total, "sum").item() / math.log(2.0) / held_out.content_bytes)
