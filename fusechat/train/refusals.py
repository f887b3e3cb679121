"""What of the settings of training would be refused once it begins, asked while there is nothing to train yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fusechat.errors import ConfigError, FusechatError, nearest
from fusechat.loss import LossOptions
from fusechat.processes import n_processes, rank
from fusechat.train.forward import router_loss, router_weight
from fusechat.train_config import TrainConfig

_ALONE = (["none"], ["all"])  # words of transformers' for no tracker and for every one that is installed


@contextmanager
def refusals_are_one_line(key: str) -> Iterator[None]:
    """Raise as ConfigError what transformers and peft say of a setting that they do not know or cannot serve here."""
    try:
        yield
    except FusechatError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def check_settings(config: TrainConfig, directory: Path) -> None:
    """Raise ConfigError for settings that do not go together, that this machine lacks a package, a device or processes
    for, or that transformers, peft or the pivot in `directory` do not know; loads no weights."""
    accumulation_steps(config)
    loss_options(config)
    if config.lora is not None and find_spec("peft") is None:
        raise ConfigError("train.lora needs the package peft: pip install 'fusechat[peft]', or leave it out")
    if config.quantization is not None and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"train.quantization: {config.quantization} needs the package bitsandbytes: pip install bitsandbytes, or "
            "leave it out (train.lora alone needs nothing)"
        )
    if not torch.cuda.is_available():
        if config.attention == "flex_attention":
            raise ConfigError(
                "train.attention: flex_attention has no backward pass on the CPU: leave it out, or use sdpa"
            )
        if config.dtype == "float16":  # accelerate would train in float32 and say nothing
            raise ConfigError("train.dtype: float16 needs a GPU: set it to bfloat16 or float32")
    _require_known("train.optimizer", config.optimizer, [one.value for one in OptimizerNames])
    _require_known("train.lr_scheduler", config.lr_scheduler, [one.value for one in SchedulerType])
    trackers = [] if config.report_to in _ALONE else config.report_to
    for tracker in trackers:
        _require_known("train.report_to", tracker, INTEGRATION_TO_CALLBACK)
    with refusals_are_one_line("train.report_to"):
        for callback in get_reporting_integration_callbacks(trackers):
            callback()  # imports its package
        if "wandb" in trackers and rank() == 0:
            _require_wandb_account()
    with refusals_are_one_line("train.lr_scheduler_args"):
        nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        get_scheduler(config.lr_scheduler, nothing, 1, 2, dict(config.lr_scheduler_args))
    model = _without_weights(directory, config)
    with refusals_are_one_line("train.optimizer"):
        # TrainingArguments itself would join the processes and take a device.
        defaults = {field.name: field.default for field in fields(TrainingArguments)}
        Trainer.get_optimizer_cls_and_kwargs(
            SimpleNamespace(**defaults | {"optim": OptimizerNames(config.optimizer)}),
            model,
        )


def _require_wandb_account() -> None:
    """Raise RuntimeError where W&B would ask who it logs for once the Trainer begins a run, or be refused.

    Versions that cannot tell without asking are left alone.
    """
    import wandb

    if wandb.run is not None or wandb.setup().settings.mode != "online":
        return
    if "prompt" in signature(wandb.login).parameters and not wandb.login(prompt=False):
        raise RuntimeError("wandb has no account here: call `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")


def _require_known(key: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(f"{key}: transformers knows no {name!r}{nearest(name, known)}")


def _without_weights(directory: Path, config: TrainConfig) -> Any:
    """Return the pivot as it would be trained, with nothing in its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        with refusals_are_one_line(f"the pivot {directory}"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, trust_remote_code=False))
        router_loss(model, router_weight(model.config, config.router_weight))
        width = model.get_input_embeddings().weight.shape[1]
        if config.lora is not None and config.lora.rank > width:
            raise ConfigError(
                f"train.lora.rank: {config.lora.rank} is above the pivot's width of {width}: such adapters are larger "
                "than the matrices that they change; lower it, or leave train.lora out"
            )
        return prepared(model, config)


def prepared(model: Any, config: TrainConfig) -> Any:
    """Give a model the attention, the checkpointing and the adapters that it is trained with."""
    if config.attention is not None:
        with refusals_are_one_line("train.attention"):
            model.set_attn_implementation(config.attention)
    if config.gradient_checkpointing:
        with refusals_are_one_line("train.gradient_checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora is not None:
        with refusals_are_one_line("train.lora"):
            model = with_adapters(model, config)
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
    return model


def with_adapters(model: Any, config: TrainConfig) -> Any:
    """Put peft's LoRA adapters on a model."""
    from peft import LoraConfig, get_peft_model

    assert config.lora is not None
    lora = config.lora
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def accumulation_steps(config: TrainConfig) -> int:
    """Return the forward passes of every process in one step; raises ConfigError when the batch does not divide."""
    per_forward = config.micro_batch_size * n_processes()
    if config.batch_size % per_forward:
        raise ConfigError(
            f"train.batch_size {config.batch_size} does not divide by micro_batch_size {config.micro_batch_size} × "
            f"{n_processes()} processes: set it to a multiple of {per_forward}"
        )
    return config.batch_size // per_forward


def loss_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options of the loss; raises ConfigError for those that do not go together."""
    names = [field.name for field in fields(LossOptions) if field.name != "softcap"]  # that is the model's
    options = {name: getattr(config, name) for name in names}
    LossOptions(**options)
    return options
