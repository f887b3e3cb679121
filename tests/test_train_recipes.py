"""The shipped launch files are what accelerate reads. They run in test_train_processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).resolve().parents[1] / "fusechat" / "recipes"
NAMES = ["accelerate-fsdp2", "accelerate-fsdp2-offload", "accelerate-zero2", "accelerate-zero3"]


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_loads_the_recipe(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "bf16"
    # The file says how it is used, by its own name.
    assert f"--config_file {name}.yaml" in (RECIPES / f"{name}.yaml").read_text()


def _launch_options(prefix: str) -> set[str]:
    """The options of `accelerate launch` that begin so: the keys of a configuration file are these."""
    from accelerate.commands.launch import launch_command_parser

    options = [o.lstrip("-") for action in launch_command_parser()._actions for o in action.option_strings]
    return {option for option in options if option.startswith(prefix)}


@pytest.mark.parametrize("name", NAMES[:2])
def test_fsdp_recipes_shard_fully_with_version_2(name: str) -> None:
    settings: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["fsdp_config"]
    assert set(settings) <= _launch_options("fsdp_")
    assert (settings["fsdp_version"], settings["fsdp_reshard_after_forward"]) == (2, True)
    offload = name.endswith("offload")
    assert settings["fsdp_offload_params"] == settings["fsdp_activation_checkpointing"] == offload


@pytest.mark.parametrize(("name", "stage"), [("accelerate-zero2", 2), ("accelerate-zero3", 3)])
def test_deepspeed_recipes_name_known_keys(name: str, stage: int) -> None:
    settings: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["deepspeed_config"]
    assert set(settings) <= _launch_options("")
    assert settings["zero_stage"] == stage
