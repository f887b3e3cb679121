"""From a dataset to trained weights: the model, the Trainer and its arguments."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from fusechat.artifact import PARTIAL_SUFFIX, Json, read_json
from fusechat.errors import FusechatError, Interrupted, Stopped
from fusechat.layout import TRAINING_LOG
from fusechat.model import load_model, unwrapped
from fusechat.processes import rank
from fusechat.tokenizer import load_tokenizer
from fusechat.train.batches import StepBatches
from fusechat.train.callbacks import (
    MarkComplete,
    Watch,
    follow_a_moved_folder,
    last_whole_checkpoint,
    wandb_run_of_its_own,
)
from fusechat.train.dataset import FusionDataset
from fusechat.train.forward import LossSettings, install_loss, router_weight
from fusechat.train.held_out import HeldOut
from fusechat.train.meter import Meter
from fusechat.train.refusals import accumulation_steps, check_settings, loss_options, prepared, refusals_are_one_line
from fusechat.train.trainer import FusionTrainer, rewind_log
from fusechat.train_config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What a training leaves: the full state on rank 0 (None elsewhere), the logged losses, held-out bits per byte."""

    state: dict[str, torch.Tensor] | None
    losses: list[float]
    held_out: list[tuple[int, float]]
    best_step: int | None
    sharding: str


def fit(
    directory: Path,
    dataset: FusionDataset,
    work: Path,
    config: TrainConfig,
    seed: int,
    *,
    held_out: HeldOut | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoints: bool = True,
) -> Fitted:
    """Train from a model directory under `work`, resuming at its last whole checkpoint.

    Raises Stopped after a SIGTERM and Interrupted after a SIGINT, with a checkpoint written; DataError when a loss is
    NaN; MismatchError when the last checkpoint was written under another way of sharding.
    """
    check_settings(config, directory)
    set_seed(seed)
    with _libraries_told(work):
        trainer = _trainer(directory, dataset, work, config, seed, held_out, checkpoints=checkpoints)
        _run(trainer, work, config, progress)
        state = _full_state(trainer)
    return Fitted(
        state=state,
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        held_out=[(e["step"], e["eval_bpb"]) for e in trainer.state.log_history if "eval_bpb" in e],
        best_step=trainer.state.best_global_step if config.final == "best" else None,
        sharding=_sharding(trainer),
    )


@contextmanager
def _libraries_told(work: Path) -> Iterator[None]:
    """Have transformers say errors alone, and TensorBoard write under `work`, for as long as the block lasts."""
    key, verbosity = "TENSORBOARD_LOGGING_DIR", get_verbosity()
    place = os.environ.get(key)
    set_verbosity_error()
    os.environ[key] = str(work / "tensorboard")
    try:
        yield
    finally:
        set_verbosity(verbosity)
        del os.environ[key]
        if place is not None:
            os.environ[key] = place


def _trainer(
    directory: Path,
    dataset: FusionDataset,
    work: Path,
    config: TrainConfig,
    seed: int,
    held_out: HeldOut | None,
    *,
    checkpoints: bool,
) -> FusionTrainer:
    """Load the pivot with its loss, and return what trains it on a data set."""
    tokenizer = load_tokenizer(directory)
    with refusals_are_one_line("train"):
        arguments = training_arguments(
            work, config, seed, with_held_out=held_out is not None, checkpoints=checkpoints
        )  # fmt: skip
        model = prepare_model(directory, config)
    order = dataset.byte_order
    install_loss(model, loss_settings(model, config), None if order is None else torch.from_numpy(order))
    trainer = FusionTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        batches=partial(
            StepBatches,
            dataset.lengths(),
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=seed,
            packing=config.packing,
        ),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        packing=config.packing,
        hard_weight_at=hard_weight_schedule(config) if dataset.sources else _always_labels,
        held_out=held_out,
        meter=Meter(["pivot", *(s.name for s in dataset.sources)], flops_per_token(model)),
        log_file=work / TRAINING_LOG,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run(trainer: FusionTrainer, work: Path, config: TrainConfig, progress: Callable[[int, int], None] | None) -> None:
    """Train to the end from the last whole checkpoint; raises as `fit` does."""
    facts = {"sharding": _sharding(trainer)}
    watch = Watch(trainer, progress)
    trainer.add_callback(watch)
    trainer.add_callback(MarkComplete(facts))
    checkpoint = last_whole_checkpoint(work, facts, remove=rank() == 0)
    if rank() == 0:
        history = [] if checkpoint is None else _history(checkpoint)
        rewind_log(work / TRAINING_LOG, history)
        if checkpoint is not None:
            follow_a_moved_folder(checkpoint)
    trainer.accelerator.wait_for_everyone()
    try:
        with wandb_run_of_its_own(config):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise FusechatError(
            f"out of memory at step {trainer.state.global_step + 1} ({str(error).partition('. ')[0]}): lower "
            "train.micro_batch_size, or set train.gradient_checkpointing or train.loss_budget_bytes; the run goes on "
            "with them at its last checkpoint"
        ) from error
    finally:
        watch.release()
    if watch.stopped_by is not None:
        step = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        stopped = Interrupted if watch.stopped_by is signal.SIGINT else Stopped
        raise stopped(f"stopped by {watch.stopped_by.name} after {step}, saved")


def prepare_model(directory: Path, config: TrainConfig) -> Any:
    """Load the pivot as it is trained: float32 master weights, or frozen weights under adapters."""
    if config.quantization is None:
        model = load_model(directory, device="cpu").train().float()  # half precision is the Trainer's autocast
    else:
        model = _quantized(directory, config.quantization, config.dtype)
    return prepared(model, config)


def _quantized(directory: Path, bits: str, dtype: str) -> Any:
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if bits == "4bit":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=settings, device_map={"": device})
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def loss_settings(model: Any, config: TrainConfig) -> LossSettings:
    """Return what of the configuration the loss needs."""
    return LossSettings(
        **loss_options(config),
        objective=config.objective,
        alm_temperature=config.alm_temperature,
        compat=config.compat,
        router_weight=router_weight(unwrapped(model).config, config.router_weight),
        budget_bytes=config.loss_budget_bytes,
    )


def hard_weight_schedule(config: TrainConfig) -> Callable[[float], float]:
    """Return λ as a function of progress in [0, 1]: constant, or from `hard_weight` to `hard_weight_end`."""
    first, last = config.hard_weight, config.hard_weight_end
    if last is None:
        return lambda progress: first
    if config.hard_weight_schedule == "linear":
        return lambda progress: first + (last - first) * progress
    return lambda progress: last + (first - last) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _always_labels(progress: float) -> float:
    return 1.0


def training_arguments(
    work: Path, config: TrainConfig, seed: int, *, with_held_out: bool, checkpoints: bool = True
) -> TrainingArguments:
    """Return the Trainer's arguments; raises ConfigError when the batch does not divide by the processes."""
    held_out: dict[str, Any] = {}
    if with_held_out:
        held_out = {
            "eval_strategy": "steps",
            "eval_steps": config.save_steps,
            "metric_for_best_model": "bpb",
            "greater_is_better": False,
            "load_best_model_at_end": config.final == "best",
        }
    arguments = TrainingArguments(
        output_dir=str(work),
        run_name=work.name.removesuffix(PARTIAL_SUFFIX),
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps(config),
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.lr_scheduler,
        lr_scheduler_kwargs=dict(config.lr_scheduler_args),
        optim=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        torch_compile=config.torch_compile,
        save_strategy="steps" if checkpoints else "no",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        ddp_timeout=round(60 * config.timeout_minutes),
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_num_workers=config.workers,
        ddp_find_unused_parameters=False,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **held_out,
    )
    if arguments.n_gpu > 1:
        # The Trainer would copy the model to every GPU (nn.DataParallel) and deal out the tokens, but not what they
        # teach.
        _tell_of_idle_gpus(arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


@cache  # a run trains several targets
def _tell_of_idle_gpus(n_visible: int) -> None:
    log.warning(
        "%d GPUs are visible and this process trains on one: to use all, launch it by `torchrun --nproc-per-node %d -m "
        "fusechat …` or `accelerate launch -m fusechat …` in place of `fusechat …`",
        n_visible,
        n_visible,
    )


def _sharding(trainer: FusionTrainer) -> str:
    if trainer.is_deepspeed_enabled:
        return f"deepspeed-zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp" if trainer.is_fsdp_enabled else "none"


def _history(checkpoint: Path) -> list[Json]:
    history: list[Json] = read_json(checkpoint / "trainer_state.json")["log_history"]
    return history


def flops_per_token(model: Any) -> float:
    """Return the FLOPs of a training step a token, without attention: two per weight in each of the forward pass, the
    gradient of the activations and that of the weights, which frozen weights do not have.

    Of a mixture's experts those count that a token passes.
    """
    inner = unwrapped(model)
    embedding = inner.get_input_embeddings().weight
    tied = inner.get_output_embeddings().weight is embedding
    config = inner.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 1)
    passed = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    flops = 0.0
    for name, parameter in inner.named_parameters():
        if parameter is embedding and not tied:
            continue  # looked up, not multiplied
        share = passed if ".experts." in name else 1.0
        flops += share * (6.0 if parameter.requires_grad else 4.0) * _n_weights(parameter)
    return flops


def _n_weights(parameter: torch.Tensor) -> int:
    """Count weights one by one, which bitsandbytes packs two to a byte."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(parameter.shape if packed is None else packed.shape)


def _full_state(trainer: FusionTrainer) -> dict[str, torch.Tensor] | None:
    """Gather the whole state on rank 0, under the names of the plain model."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else every model loaded from here on would be spread, by one process alone
    if rank() != 0:
        return None
    wrappers = r"_orig_mod\.|_checkpoint_wrapped_module\.|^module\."
    return {re.sub(wrappers, "", name): tensor for name, tensor in state.items()}
