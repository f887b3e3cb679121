"""Settings that no training can follow."""

# ruff: noqa: F811  (a fixture is imported where it is a parameter)

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_train_failures import FAST, _train, stores  # noqa: F401

import fusechat
from fusechat.errors import ConfigError
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
        ("final=best", "final: best needs held-out dialogues"),
    ],
)
def test_settings_that_cannot_be_served_are_one_line(
    setting: str, said: str, tiny_world: Any, stores: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        _train(tiny_world, stores, tmp_path / "t", setting)
    assert "\n" not in str(raised.value)


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
        _train(tiny_world, stores, tmp_path / "t", "quantization=4bit", "lora.rank=4")
    with pytest.raises(ConfigError, match="quantization needs lora"):
        parse_train(["quantization=4bit"])
