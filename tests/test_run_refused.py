"""What a run is refused for before its first stage."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_world import write_run

from fusechat.errors import ConfigError, DataError, FusechatError
from fusechat.run import run


def test_a_missing_model_or_file_is_named_before_anything_is_written(tiny_world: Any, tmp_path: Path) -> None:
    config = write_run(tiny_world, tmp_path / "x")
    with pytest.raises(DataError, match="does not exist"):
        run(config, ["data.train=./nothing.jsonl"])
    with pytest.raises(DataError, match=r"model .*nowhere.* does not exist"):
        run(config, ["pivot=./nowhere"])
    with pytest.raises(DataError, match=r"model .*other.* does not exist"):
        run(config, ["pivot=./other"])
    with pytest.raises(DataError, match=r"model .*third.* does not exist"):
        run(config, [f"sources=[{tiny_world.source}, ./third]"])
    with pytest.raises(ConfigError, match="did you mean `select_topk`"):
        run(config, ["merge.select_top_k=1"])
    for entry, message in (
        ("{merge_method: sec}", "did you mean `sce`"),
        ("{merge_method: sce, parameter: {}}", "did you mean `parameters`"),
        ("{merge_method: sce, parameters: {select_top_k: 0.1}}", "did you mean `select_topk`"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(config, [f"merge.sweep=[{entry}]"])
    assert not (tmp_path / "x").exists()


def test_what_a_stage_would_refuse_is_refused_before_the_first(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of extraction that a setting of a later stage, or of the last source, makes worthless."""
    base, pickled = tmp_path / "base", tmp_path / "pickled"
    shutil.copytree(tiny_world.source, base)
    (base / "chat_template.jinja").unlink()
    shutil.copytree(tiny_world.source, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    config = write_run(tiny_world, tmp_path / "x")
    for overrides, message in (
        (["align.tokens=dtw"], "set align.granularity: first"),
        (["train.divergence=reverse_kl", "train.missing=renormalise"], "reverse_kl is infinite"),
        (["train.divergence=jsd", "train.beta=1.5"], "jsd needs 0 < beta < 1"),
        (["train.lora.rank=4"], "needs the package peft"),
        (["train.attention=flex_attention"], "no backward pass on the CPU"),
        (
            ["train.optimizer=adamw_trch"],
            "train.optimizer: transformers knows no 'adamw_trch', did you mean `adamw_torch`",
        ),
        (["train.optimizer=adamw_bnb_8bit"], "need to install `bitsandbytes`"),
        (["train.lr_scheduler=cosin"], "train.lr_scheduler: transformers knows no 'cosin', did you mean `cosine`"),
        (
            ["train.lr_scheduler_args={num_cycle: 2}"],
            "train.lr_scheduler_args: .* unexpected keyword argument 'num_cycle'",
        ),
        (["train.report_to=[tensorbord]"], "did you mean `tensorboard`"),
        (["train.report_to=[wandb]"], "train.report_to: .*pip install wandb"),
        (["train.dtype=float16"], "float16 needs a GPU"),
        (["train.attention=flash_attention_2"], "FlashAttention2"),
        (["train.router_weight=0.1"], "has no router loss"),
        (["train.max_steps=0"], "max_steps is 0"),
        (["train.learning_rate=.inf"], "should be a finite number"),
        (["seed=-1"], "`seed`: Input should be greater than or equal to 0"),
        (["merge.method=ties"], "should be 'sce' or 'linear'"),
        (["merge.select_topk=10"], "less than or equal to 1"),
        (["merge.method=linear", "merge.weights=[.nan]"], "should be a finite number"),
        (["merge.sweep=[]"], "at least 1 item"),
        (["eval.bootstrap_samples=1000000000"], "less than or equal to 100000"),
        (["data.held_out_fraction=2"], "less than 1"),
        (["extract.device_map=atuo"], "extract.device_map: atuo is none that torch knows: write auto"),
        (["extract.device=gpu"], "extract.device: gpu is none that torch knows"),
        ([f"sources=[{{model: {tiny_world.source}, extract: {{device: 'cuda:7'}}}}]"], "cuda:7 is not here"),
        (["out=/proc/nothing/run"], "/proc/nothing/run .* choose another place"),
        ([f"out={config}/run"], "is a file: choose another place"),
        (["stores=/proc/nothing"], "cannot make /proc/nothing"),
        (["extract.template=./pivto.jinja"], r"pivto\.jinja does not exist"),
        (["extract.top_k=1000"], "top_k 1000 is more than"),
        ([f"sources=[{{model: {tiny_world.source}, extract: {{backend: vllm}}}}]"], "pip install 'fusechat\\[vllm\\]'"),
        ([f"sources=[{tiny_world.source}, {base}]"], "has no chat template"),
        ([f"sources=[{tiny_world.source}, {pickled}]"], "holds pickled weights"),
    ):
        with pytest.raises(FusechatError, match=message) as refused:
            run(config, overrides)
        assert "\n" not in str(refused.value)
    monkeypatch.delitem(sys.modules, "peft")
    with pytest.raises(ConfigError, match=r"train\.lora: .*q_prj"):
        run(config, ["train.lora.target_modules=[q_prj]"])
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10**5))
        with pytest.raises(FusechatError, match=r"needs 0\.\d MB, 0\.1 MB are free"):
            run(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="does not divide by micro_batch_size 3 × 4 processes"):
        run(config)
    assert not (tmp_path / "x").exists()
