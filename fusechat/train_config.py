"""How a target is trained: the section `train` of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from fusechat.config_values import Section, overridden, validated


class LoraConfig(Section):
    """Low-rank adapters instead of full training (peft)."""

    rank: int = Field(16, ge=1, description="width of the adapters")
    alpha: float = Field(32.0, gt=0, description="their scale is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of their inputs")
    target_modules: str | list[str] = Field("all-linear", description="names of the layers that get one, as in peft")


_OBJECTIVES_OF = {
    "alm_temperature": ("alm",),
    "divergence": ("soft",),
    "beta": ("soft",),
    "missing": ("soft",),
    "temperature": ("soft", "uld"),
    "student_temperature": ("soft", "uld"),
    "label_smoothing": ("soft", "uld"),
    "z_loss": ("soft",),
    "compat": ("soft",),
    "when_pivot_wins": ("soft",),
}
"""Keys of `train` that not every objective takes, by those that do."""


class TrainConfig(Section):
    """L = λ·L_SFT + (1−λ)·L_Fusion (arXiv 2408.07990, eq. 3)."""

    mode: Literal["pairwise", "multi"] = Field(
        "pairwise", description="one target per source, as in the paper; or one target that all sources teach at once"
    )
    objective: Literal["soft", "alm", "uld"] = Field(
        "soft",
        description="match distributions; alm: likelihoods of byte-aligned chunks (arXiv 2503.20083); uld: sorted "
        "probabilities (arXiv 2402.12030). The last two need no vocabulary map",
    )
    alm_temperature: float = Field(100.0, gt=0, description="τ of the chunks' likelihoods")
    hard_weight: float = Field(0.9, ge=0, le=1, description="λ: the weight of the dialogue's own next token")
    hard_weight_end: float | None = Field(None, ge=0, le=1, description="λ at the last step; constant when absent")
    hard_weight_schedule: Literal["linear", "cosine"] = Field("linear", description="how λ gets there")
    divergence: Literal["ce", "kl", "reverse_kl", "jsd", "tvd", "skew_kl", "alpha"] = Field(
        "ce", description="of the target's distribution from the taught one"
    )
    beta: float = Field(0.5, description="parameter of jsd, skew_kl and alpha")
    temperature: float = Field(1.0, gt=0, description="of the taught distribution")
    student_temperature: float = Field(1.0, gt=0, description="of the target's, in the soft term only")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the hard target spread over the vocabulary")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-sum-exp")
    missing: Literal["renormalise", "tail", "zero", "uniform"] = Field(
        "tail", description="mass outside the stored top-k; `renormalise` is the paper's"
    )
    compat: Literal["none", "upstream"] = Field(
        "none", description="upstream: masses rounded and equal ids as in the research code's dense targets, for parity"
    )
    select: Literal["min_ce", "avg_ce", "source", "weighted"] = Field(
        "min_ce",
        description="who teaches: the lowest cross-entropy; all by exp(−cross-entropy); the sources whatever the pivot "
        "knows; or all by `source_weights`",
    )
    select_unit: Literal["sequence", "turn", "token"] = Field("sequence", description="what is decided as one")
    source_weights: dict[str, float] = Field({}, description="weighted: by source's name and `pivot`, 1 when absent")
    when_pivot_wins: Literal["labels", "pivot"] = Field(
        "labels",
        description="what the pivot's share of a row teaches: its label alone or, as in the paper, the pivot's rows",
    )
    ce_unit: Literal["byte", "token"] = Field(
        "byte", description="unit of the cross-entropies compared; token is the paper's"
    )
    learning_rate: float = Field(5e-6, gt=0, description="the highest, after warm-up")
    epochs: float = Field(3.0, gt=0, description="passes over the dialogues")
    max_steps: int = Field(-1, ge=-1, description="stop after so many steps; −1: as many as `epochs` asks for")
    batch_size: int = Field(128, ge=1, description="dialogues per optimiser step, over all devices")
    micro_batch_size: int = Field(4, ge=1, description="dialogues per forward pass and device (packed: on average)")
    packing: bool = Field(False, description="dialogues behind each other in one row instead of padding")
    attention: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] | None = Field(
        None, description="transformers' implementation; its own choice when absent"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises")
    lr_scheduler: str = Field("cosine", description="a name transformers' Trainer knows")
    lr_scheduler_args: dict[str, Any] = Field({}, description="its own, such as {num_decay_steps: 200}")
    optimizer: str = Field("adamw_torch", description="a name transformers' Trainer knows")
    weight_decay: float = Field(0.0, ge=0, description="of matrices, not of biases and norms")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to it; 0: they are not")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the forward pass; weights and optimiser are float32"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    torch_compile: bool = Field(False, description="compile the model; the loss stays an opaque operator")
    router_weight: float | None = Field(None, ge=0, description="of a mixture of experts' router loss; None: its own")
    save_steps: int = Field(500, ge=1, description="optimiser steps between checkpoints and held-out scores")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept; the best one by held-out score among them")
    final: Literal["last", "best"] = Field("last", description="the step that becomes the target; best: held-out")
    logging_steps: int = Field(10, ge=1, description="optimiser steps between lines of the log")
    report_to: list[str] = Field([], description="tensorboard, wandb, or others that transformers' Trainer knows")
    workers: int = Field(0, ge=0, description="processes that prepare batches")
    timeout_minutes: float = Field(
        60.0, gt=0, description="how long one process waits for the others (NCCL, gloo) before the run ends"
    )
    loss_budget_bytes: int | None = Field(None, gt=0, description="memory for one chunk of logits")
    sft_control: bool = Field(True, description="also train on the same data, steps, order and seed with λ = 1")
    lora: LoraConfig | None = Field(None, description="train low-rank adapters, merged into the target at the end")
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="of the frozen weights under lora (QLoRA), by bitsandbytes"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError("batch_size must be a multiple of micro_batch_size")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: give 1 or more, or -1 for as many as epochs asks for")
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantization needs lora: quantised weights cannot be trained")
        if self.objective != "soft" and (self.select not in ("min_ce", "source") or self.select_unit != "sequence"):
            raise ValueError(f"objective {self.objective} takes select min_ce or source, per sequence")
        for key, objectives in _OBJECTIVES_OF.items():
            if self.objective not in objectives and getattr(self, key) != TrainConfig.model_fields[key].default:
                raise ValueError(f"{key} is for objective: {' or '.join(objectives)}, not {self.objective}: remove it")
        asked = (self.divergence, self.missing, self.temperature, self.z_loss)
        if self.compat == "upstream" and (
            asked != ("ce", "renormalise", 1.0, 0.0) or self.select not in ("min_ce", "source")
        ):
            raise ValueError(
                "compat: upstream takes divergence ce, missing renormalise, temperature 1, z_loss 0 and select min_ce "
                "or source"
            )
        if self.source_weights and (self.select != "weighted" or min(self.source_weights.values()) < 0):
            raise ValueError("source_weights are numbers of 0 or more, for select: weighted")
        return self


def parse_train(overrides: Sequence[str]) -> TrainConfig:
    """Build training settings from overrides such as `epochs=2`; raises ConfigError in one line."""
    return validated(TrainConfig, overridden(overrides), "train")
