"""Training: the loss is the mean over all rows of a step, however the step is cut; targets are ordinary models."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

import fusechat
from fusechat.cli import app
from fusechat.dialogue import load_dialogues
from fusechat.errors import DataError, MismatchError
from fusechat.model import load_model
from fusechat.store import open_topk, row_positions
from fusechat.train.callbacks import wandb_run_of_its_own
from fusechat.train_config import TrainConfig, parse_train

FAST: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 6,
    "micro_batch_size": 6,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
}


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


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "workers": 2},
        {"gradient_checkpointing": True, "report_to": ["tensorboard"]},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_how_it_is_computed_changes_nothing_but_the_last_bits(
    settings: dict[str, Any], tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    for name, extra in (("plain", {}), ("other", settings)):
        config = TrainConfig(**FAST | {"micro_batch_size": 2} | extra)
        fusechat.train(str(tiny_world.pivot), stores / "pivot", stores / "aligned", tmp_path / name, config)
    plain, other = _weights(tmp_path / "plain"), _weights(tmp_path / "other")
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-4)
    assert (tmp_path / "other" / "tensorboard").exists() == ("report_to" in settings)


@pytest.mark.parametrize(
    "optimizer", ["adamw_torch_fused", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_optimizers_are_the_trainers(optimizer: str, tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    if "bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    config = TrainConfig(**FAST | {"optimizer": optimizer, "max_steps": 2, "logging_steps": 1})
    made = fusechat.train(str(tiny_world.pivot), stores / "pivot", stores / "aligned", tmp_path / "t", config)
    assert made["losses"][1] < made["losses"][0]


def test_held_out_bits_are_the_evaluations_and_the_best_step_can_be_the_target(
    tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    from fusechat.evaluate.bpb import score_dialogues

    dialogues = load_dialogues(tiny_world.dialogues)[:7]
    # A rate that first helps and then destroys.
    rate = {"learning_rate": 2e-2, "lr_scheduler": "constant", "max_steps": 6, "save_steps": 1, "final": "best"}
    smoothed = {"label_smoothing": 0.2}  # of what is learned, not of what is scored
    made = fusechat.train(
        str(tiny_world.pivot), stores / "pivot", stores / "aligned", tmp_path / "t",
        TrainConfig(**FAST | rate | smoothed),
        held_out=dialogues,
    )  # fmt: skip
    measured = dict(made["measured"]["held_out_bits_per_byte"])
    assert sorted(measured) == [1, 2, 3, 4, 5, 6]
    best = made["measured"]["best_step"]
    assert measured[best] == min(measured.values())
    scores = score_dialogues(str(tmp_path / "t"), dialogues, dtype="float32")
    bits = scores.nll.sum() / np.log(2) / scores.content_bytes.sum()
    assert bits == pytest.approx(measured[best], rel=1e-4)
    log = [json.loads(line) for line in (tmp_path / "t" / "training.jsonl").read_text().splitlines()]
    assert {entry["step"] for entry in log if "held_out_bits_per_byte" in entry} == set(measured)
    first = log[0]
    assert {"loss", "hard_loss", "soft_loss", "coverage", "share_pivot", "tokens_per_second"} <= first.keys()
    assert "fusechat" in (tmp_path / "t" / "README.md").read_text()


def test_the_best_step_on_other_dialogues_is_another_target(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    """Catches a target taken for the best on dialogues it was not chosen on."""
    dialogues = load_dialogues(tiny_world.dialogues)

    def train(final: str, held_out: Any) -> Any:
        config, place = TrainConfig(**FAST | {"final": final}), tmp_path / final
        made = fusechat.train(str(tiny_world.pivot), stores / "pivot", None, place, config, held_out=held_out)
        return made["request"]

    assert train("best", dialogues[:7]) == train("best", dialogues[:7])
    with pytest.raises(MismatchError, match="chosen_on_fingerprint"):
        train("best", dialogues[7:14])
    assert train("last", dialogues[:7]) == train("last", dialogues[7:14])  # what is only watched changes nothing


def test_held_out_dialogues_are_rendered_as_a_store_of_another_template_was(
    tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    """Catches `pivot:PATH` of a manifest taken for a hub id."""
    dialogues = load_dialogues(tiny_world.dialogues)
    named = f"pivot:{tiny_world.pivot}"
    made = fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "store", top_k=5, template=named)
    assert made["template"] == str(tiny_world.pivot)
    config = TrainConfig(**FAST)
    train = partial(fusechat.train, str(tiny_world.pivot), config=config, aligned_store=None, held_out=dialogues[:7])
    expected = train(stores / "pivot", out=tmp_path / "own")["measured"]["held_out_bits_per_byte"]
    assert train(tmp_path / "store", out=tmp_path / "new")["measured"]["held_out_bits_per_byte"] == expected
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(json.dumps(made | {"template": named}))  # as it was written before
    assert train(tmp_path / "store", out=tmp_path / "old")["measured"]["held_out_bits_per_byte"] == expected


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


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_on_quantised_weights_are_merged_into_the_whole_ones(
    bits: str, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    config = TrainConfig(**FAST | {"logging_steps": 1}, lora=lora, quantization=bits)
    made = fusechat.train(str(tiny_world.pivot), stores / "pivot", stores / "aligned", tmp_path / "q", config)
    assert made["losses"][-1] < made["losses"][0]
    target, pivot = _weights(tmp_path / "q"), _weights(tiny_world.pivot)
    moved = {name.split(".")[-2] for name in target if not torch.equal(target[name], pivot[name])}
    assert moved == {"q_proj", "v_proj"}


def test_a_target_keeps_its_pivots_dtype_and_tokenizer(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    """Catches files that a merge takes over and a target has lost, and a folder among them that ends a training."""
    half = load_model(tiny_world.pivot).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "pivot")
    for file in (*tiny_world.pivot.glob("token*"), *tiny_world.pivot.glob("*.jinja")):
        (tmp_path / "pivot" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pivot" / "base.tiktoken").write_text("YQ== 0")
    (tmp_path / "pivot" / "tokenizer").mkdir()
    fusechat.extract(str(tmp_path / "pivot"), load_dialogues(tiny_world.dialogues), tmp_path / "store", top_k=5)
    config = TrainConfig(**FAST, dtype="bfloat16")
    fusechat.train(str(tmp_path / "pivot"), tmp_path / "store", None, tmp_path / "t", config)
    assert {w.dtype for w in _weights(tmp_path / "t").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "t").dtype == torch.bfloat16
    assert (tmp_path / "t" / "base.tiktoken").read_text() == "YQ== 0"
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == (tiny_world.pivot / "tokenizer.json").read_bytes()


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


@pytest.mark.parametrize("open_before", [False, True])
def test_a_target_ends_the_wandb_run_it_began(monkeypatch: pytest.MonkeyPatch, open_before: bool) -> None:
    """Catches the next target's steps logged into this one's run, where W&B drops them; and a caller's run ended."""
    ended: list[bool] = []
    wandb = SimpleNamespace(run=object() if open_before else None, finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    with suppress(KeyError), wandb_run_of_its_own(parse_train(["report_to=[wandb]"])):
        wandb.run = object()  # as the Trainer does
        raise KeyError
    assert bool(ended) != open_before
    with wandb_run_of_its_own(parse_train([])):
        pass
    assert len(ended) == (not open_before)


def test_held_out_text_is_read_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches options of reading that are missing, or that nothing follows."""
    scored: list[Any] = []

    def train(*_: Any, held_out: Any, **__: Any) -> Any:
        scored.extend(held_out)
        return {"losses": []}

    monkeypatch.setattr(sys.modules["fusechat.train"], "train", train)
    (tmp_path / "text.txt").write_text("one of them~~another that is longer")
    command = ["train", "pivot", "--pivot-store", "p", "--out", str(tmp_path / "t")]
    options = ["--separator", "~~", "--max-bytes", "12"]
    done = CliRunner().invoke(app, [*command, "--held-out", str(tmp_path / "text.txt"), *options])
    assert done.exit_code == 0, done.output
    texts = [dialogue.messages[0].content for dialogue in scored]
    assert texts[0] == "one of them"
    assert len(texts) > 2
    assert "".join(texts[1:]).replace(" ", "") == "anotherthatislonger"
    for option in (["--format", "text"], options[:2], options[2:]):
        done = CliRunner().invoke(app, [*command, *option])
        assert done.exit_code == 2
        assert "--held-out" in done.output
