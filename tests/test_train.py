"""Training: the loss is the mean over all rows of a step, however the step is cut; targets are ordinary models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import fusechat
from fusechat.config import TrainConfig
from fusechat.dialogue import load_dialogues
from fusechat.errors import DataError, MismatchError
from fusechat.model import load_model
from fusechat.store import open_topk, row_positions

FAST: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 6,
    "micro_batch_size": 6,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
}


@pytest.fixture(scope="module")
def stores(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pivot's and the source's stores and the alignment of the two."""
    folder = tmp_path_factory.mktemp("stores")
    dialogues = load_dialogues(tiny_world.dialogues)
    for name in ("pivot", "source"):
        fusechat.extract(str(getattr(tiny_world, name)), dialogues, folder / name, top_k=5)
    fusechat.align(folder / "pivot", folder / "source", folder / "aligned")
    return folder


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_micro_batches_change_nothing_but_the_last_bits(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    """Dialogues differ in length: a mean of micro-batch means would weigh their rows differently."""
    for size in (6, 2):
        config = TrainConfig(**FAST | {"micro_batch_size": size})
        fusechat.train(str(tiny_world.pivot), stores / "pivot", stores / "aligned", tmp_path / str(size), config)
    one, many = _weights(tmp_path / "6"), _weights(tmp_path / "2")
    moved = _weights(tiny_world.pivot)
    for name, weight in one.items():
        torch.testing.assert_close(weight, many[name], rtol=0, atol=2e-4)
        assert not torch.equal(weight, moved[name]), name


def test_the_controls_first_loss_is_plain_cross_entropy(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    store = open_topk(stores / "pivot")
    config = TrainConfig(**FAST | {"batch_size": len(store), "micro_batch_size": len(store), "max_steps": 1})
    provenance = fusechat.train(str(tiny_world.pivot), stores / "pivot", None, tmp_path / "sft", config)
    model = load_model(tiny_world.pivot)
    total, count = 0.0, 0
    for index in store:
        record = store[index]
        ids = torch.from_numpy(record["token.input_ids"].astype(np.int64))
        rows = torch.from_numpy(row_positions(record["token.loss_mask"]))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits[rows], ids[rows + 1], reduction="sum").item()
        count += len(rows)
    assert provenance["losses"] == [pytest.approx(total / count, abs=2e-4)]


def test_adapters_are_merged_into_an_ordinary_model(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    config = TrainConfig(**FAST, lora={"rank": 4, "target_modules": ["q_proj", "v_proj"]})
    fusechat.train(str(tiny_world.pivot), stores / "pivot", stores / "aligned", tmp_path / "lora", config)
    assert not list((tmp_path / "lora").glob("adapter*"))
    target, pivot = _weights(tmp_path / "lora"), _weights(tiny_world.pivot)
    assert target.keys() == pivot.keys()
    moved = {name.split(".")[-2] for name in target if not torch.equal(target[name], pivot[name])}
    assert moved == {"q_proj", "v_proj"}


def test_a_target_keeps_its_pivots_dtype(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    half = load_model(tiny_world.pivot).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "pivot")
    for file in (*tiny_world.pivot.glob("token*"), *tiny_world.pivot.glob("*.jinja")):
        (tmp_path / "pivot" / file.name).write_bytes(file.read_bytes())
    fusechat.extract(str(tmp_path / "pivot"), load_dialogues(tiny_world.dialogues), tmp_path / "store", top_k=5)
    config = TrainConfig(**FAST, dtype="bfloat16")
    fusechat.train(str(tmp_path / "pivot"), tmp_path / "store", None, tmp_path / "t", config)
    assert {w.dtype for w in _weights(tmp_path / "t").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "t").dtype == torch.bfloat16


def test_a_diverging_run_stops_and_leaves_no_target(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    config = TrainConfig(**FAST | {"learning_rate": 1e30, "max_steps": 60, "max_grad_norm": 0})
    with pytest.raises(
        DataError, match=r"the loss is NaN at step \d+, micro-batch 1 of 1 \(dialogues [\d, ]+\): lower"
    ):
        fusechat.train(str(tiny_world.pivot), stores / "pivot", None, tmp_path / "t", config)
    assert not (tmp_path / "t").exists()


def test_a_target_of_other_settings_is_refused(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    fusechat.train(str(tiny_world.pivot), stores / "pivot", None, tmp_path / "t", TrainConfig(**FAST))
    again = fusechat.train(str(tiny_world.pivot), stores / "pivot", None, tmp_path / "t", TrainConfig(**FAST))
    assert again["n_dialogues"] == 24
    with pytest.raises(MismatchError, match=r"learning_rate: 0\.001 there, 0\.002 here"):
        fusechat.train(
            str(tiny_world.pivot), stores / "pivot", None, tmp_path / "t", TrainConfig(**FAST | {"learning_rate": 2e-3})
        )
