"""Training: one target per source from the pivot, and a control that sees the same data without any source.

Pairwise fusion (arXiv 2408.07990): L = λ·L_SFT + (1−λ)·L_Fusion, L_Fusion the cross-entropy between the target's
distribution and the pivot's or the source's, whichever predicts the dialogue better.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fusechat.artifact import PARTIAL_SUFFIX, Json, differences, full_disk_is_named, read_json, sha256_file, write_json
from fusechat.callable_module import make_callable
from fusechat.checkpoint import checkpoint_sha256, resolve_model
from fusechat.config import TrainConfig
from fusechat.errors import DataError, MismatchError
from fusechat.model import load_model
from fusechat.store import open_aligned, open_topk
from fusechat.tokenizer import load_tokenizer
from fusechat.train.dataset import FusionDataset

__all__ = ["train"]
make_callable(__name__)

PROVENANCE = "provenance.json"


def train(
    pivot: str,
    pivot_store: Path,
    aligned_store: Path | None,
    out: Path,
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """Train one target from the pivot and return its provenance; without an aligned store, the SFT control.

    `out` becomes a Hugging Face model directory; checkpoints lie in `out` + ".partial" until it is whole, and a run
    that was killed resumes at the last one with the same result. `progress(done_steps, all_steps)` is called after
    every step. Raises MismatchError when `out` was made from other inputs, DataError when a loss is NaN.
    """
    config = config or TrainConfig()
    directory = resolve_model(pivot)
    request: Json = {
        "format": "fusechat.target",
        "version": 1,
        "pivot_sha256": checkpoint_sha256(directory),
        "pivot_store_sha256": sha256_file(pivot_store / "manifest.json"),
        "aligned_store_sha256": sha256_file(aligned_store / "manifest.json") if aligned_store else None,
        "train": config.model_dump(),
        "seed": seed,
    }
    if (out / PROVENANCE).exists():
        found = read_json(out / PROVENANCE)
        _require_same(out, request, found["request"])
        return dict(found)
    work = out.with_name(out.name + PARTIAL_SUFFIX)
    if (work / "request.json").exists():
        _require_same(work, request, read_json(work / "request.json"))
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "request.json", request)

    store = open_topk(pivot_store)
    dataset = FusionDataset(
        store,
        open_aligned(aligned_store) if aligned_store else None,
        hard_weight=config.hard_weight if aligned_store else 1.0,
        select=config.select,
        when_pivot_wins=config.when_pivot_wins,
        ce_unit=config.ce_unit,
    )
    with full_disk_is_named(work):
        losses = _fit(directory, dataset, work, config, seed, progress)
    provenance: Json = {
        "format": "fusechat.target",
        "version": 1,
        "pivot": str(directory.resolve()),
        "aligned_store": str(aligned_store) if aligned_store else None,
        "n_dialogues": len(dataset),
        "source_share": dataset.source_share,
        "losses": losses,
        "request": request,
    }
    final = work / "model"
    _copy_tokenizer(directory, final)
    write_json(final / PROVENANCE, provenance)
    if out.exists():
        raise MismatchError(f"{out} exists and is not a target of ours: choose another place")
    final.replace(out)
    shutil.rmtree(work)
    return provenance


def _require_same(place: Path, request: Json, found: Json) -> None:
    if found != request:
        flat, old = ({**r, **r["train"]} for r in (request, found))
        what = "; ".join(d for d in differences(flat, old) if not d.startswith("train:"))
        raise MismatchError(f"{place} was trained from other inputs ({what}): remove it or choose another place")


def _fit(
    directory: Path,
    dataset: FusionDataset,
    work: Path,
    config: TrainConfig,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> list[float]:
    """Run the Trainer to the end and leave the model in work/model; return the logged losses."""
    import torch
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

    from fusechat.train.collate import collate
    from fusechat.train.trainer import FusionTrainer, MarkComplete, last_whole_checkpoint

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if progress is not None:
                progress(state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if math.isnan((logs or {}).get("loss", 0.0)):
                raise DataError(
                    f"the loss is NaN at step {state.global_step}: lower train.learning_rate, or train in float32"
                )

    set_seed(seed)
    tokenizer = load_tokenizer(directory)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    model = load_model(directory, device="cpu").train()
    own_dtype = model.dtype
    model = model.float()  # master weights; half precision is the Trainer's autocast
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.lora is not None:
        model = _with_lora(model, config)
    trainer = FusionTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
            learning_rate=config.learning_rate,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps,
            warmup_steps=config.warmup_ratio,
            lr_scheduler_type=config.lr_scheduler,
            optim=config.optimizer,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.dtype == "bfloat16",
            fp16=config.dtype == "float16",
            save_strategy="steps",
            save_steps=config.save_steps,
            save_total_limit=2,
            logging_steps=10,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            seed=seed,
            data_seed=seed,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        data_collator=partial(collate, pad_token_id=pad),
        callbacks=[Report(), MarkComplete()],
        missing=config.missing,
        byte_order=None if dataset.byte_order is None else torch.from_numpy(dataset.byte_order),
        loss_budget_bytes=config.loss_budget_bytes,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole_checkpoint(work)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    shutil.rmtree(work / "model", ignore_errors=True)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora is not None:
        trained = trained.merge_and_unload()
    trained.to(own_dtype).save_pretrained(work / "model")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _with_lora(model: Any, config: TrainConfig) -> Any:
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


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the pivot's tokenizer files as they are: saving a loaded tokenizer would rewrite them."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja"):
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)
