"""Settings that no training can follow."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train_world import FAST, train_target
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_info

import fusechat
from fusechat.errors import ConfigError, MismatchError
from fusechat.train.refusals import check_settings
from fusechat.train_config import parse_train


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer=nonsense", "transformers knows no 'nonsense': there are adamw_torch"),
        ("optimizer=lomo", "You need to install"),
        ("lr_scheduler=nonsense", "transformers knows no 'nonsense': there are linear"),
        ("lr_scheduler=warmup_stable_decay", "num_decay_steps"),
        ("report_to=[nonsense]", "transformers knows no 'nonsense': there are"),
        ("attention=flex_attention", "flex_attention has no backward pass on the CPU"),
        ("lora.target_modules=[nonsense]", "Target modules .* not found"),
        ("lora.rank=33", "lora.rank: 33 is above the pivot's width of 32"),
        ("final=best", "final: best needs held-out dialogues"),
    ],
)
def test_settings_that_cannot_be_served_are_one_line(
    setting: str, said: str, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        train_target(tiny_world, stores, tmp_path / "t", setting)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("mode", "account", "refused"), [("online", False, True), ("online", True, False), ("offline", False, False)]
)
def test_wandb_without_an_account_is_refused_before_a_run_begins(
    mode: str, account: bool, refused: bool, tiny_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of extraction before W&B asks, in the first step of training, who it is."""
    wandb = SimpleNamespace(
        run=None,
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)),
        login=lambda prompt=True: account,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setattr("fusechat.train.refusals.get_reporting_integration_callbacks", lambda _: [])
    with pytest.raises(ConfigError, match="report_to: wandb has no account") if refused else nullcontext():
        check_settings(parse_train(["report_to=[wandb]"]), tiny_world.pivot)


def test_what_is_no_target_is_refused_before_training(tiny_world: Any, stores: Path, tmp_path: Path) -> None:
    """Catches a refusal that comes when all is trained, and a KeyError for what `fusechat merge` has made or begun."""
    others = {"merge": '{"format": "fusechat.merge", "request": {"merge_method": "sce"}}', "list": "[]", "text": None}
    for name, provenance in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").touch()
        if provenance is not None:
            (tmp_path / name / "provenance.json").write_text(provenance)
        with pytest.raises(MismatchError, match=f"{name} exists and is not a target of ours"):
            train_target(tiny_world, stores, tmp_path / name)
        assert not (tmp_path / f"{name}.partial").exists()
    (tmp_path / "begun.partial").mkdir()
    (tmp_path / "begun.partial" / "request.json").write_text('{"format": "fusechat.merge"}')
    with pytest.raises(MismatchError, match=r'format: "fusechat\.merge" there, "fusechat\.target" here'):
        train_target(tiny_world, stores, tmp_path / "begun")


def test_a_target_that_came_meanwhile_is_kept(
    tiny_world: Any, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an OSError of the file system, or another's target replaced, where one was copied there meanwhile."""
    from fusechat.train import export

    def save_and_copy(*_: object) -> None:
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "provenance.json").write_text('{"format": "fusechat.target", "request": {}}')
        (tmp_path / "t.partial" / "model").mkdir()

    monkeypatch.setattr(export, "save_target", save_and_copy)
    with pytest.raises(MismatchError, match="t has become a target while this one was trained"):
        train_target(tiny_world, stores, tmp_path / "t", "max_steps=1")
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["provenance.json"]


def test_training_leaves_the_caller_s_logging_as_it_was_and_takes_an_empty_folder(
    tiny_world: Any, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches transformers silenced, or TensorBoard sent elsewhere, in a process that goes on with something else."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
    (tmp_path / "t").mkdir()
    before = get_verbosity()
    set_verbosity_info()
    try:
        train_target(tiny_world, stores, tmp_path / "t", "max_steps=1", "report_to=[tensorboard]")
        assert get_verbosity() == logging.INFO
    finally:
        set_verbosity(before)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "mine"
    assert (tmp_path / "t" / "tensorboard").is_dir()
    assert not (tmp_path / "t.partial").exists()


def test_settings_are_keys_or_a_configuration_and_not_both() -> None:
    """Catches a key that a call takes for nothing, and one that the other stage takes and this one does not."""
    with pytest.raises(ConfigError, match="train: unknown key `epoch`, did you mean `epochs`"):
        fusechat.train("pivot", "store", None, "target", epoch=1)
    with pytest.raises(ConfigError, match="a configuration or options, not both: epochs"):
        fusechat.train("pivot", "store", None, "target", parse_train(FAST), epochs=1)


def test_a_world_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fusechat.train.fit import training_arguments

    monkeypatch.setattr("fusechat.train.refusals.n_processes", lambda: 4)
    with pytest.raises(
        ConfigError, match=r"batch_size 6 does not divide by micro_batch_size 3 × 4 processes: .* of 12"
    ):
        training_arguments(tmp_path, parse_train(FAST), 0, with_held_out=False)


def test_quantised_training_without_bitsandbytes_says_what_is_missing(
    tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is here")
    with pytest.raises(ConfigError, match=r"quantization: 4bit needs the package bitsandbytes"):
        train_target(tiny_world, stores, tmp_path / "t", "quantization=4bit", "lora.rank=4")
    with pytest.raises(ConfigError, match="quantization needs lora"):
        parse_train(["quantization=4bit"])
