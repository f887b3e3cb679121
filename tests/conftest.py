"""Fixtures shared by all tests: where the real data is, and small models made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A shared or loaded machine is no reason for a red test.
settings.register_profile("fusechat", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fusechat")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
TEXT = "the cat sat on a mat and saw the big red dog run over green hills while birds sing softly at dawn"
WORDS = tuple(TEXT.split(" "))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, models and texts; skips where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FUSECHAT_SHARED_DATA", default))
    if not (folder / "manifest.jsonl").exists():
        pytest.skip("real data not here: ../shared/data is absent and FUSECHAT_SHARED_DATA names no folder")
    return folder


@pytest.fixture(params=["require", "off"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled engine (when built) and on the numba fallback."""
    return _chosen(request, monkeypatch, "FUSECHAT_NATIVE", compiled="require")


@pytest.fixture(params=["native", "torch"])
def loss_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled engine's loss (when built) and on torch's own form."""
    return _chosen(request, monkeypatch, "FUSECHAT_LOSS", compiled="native")


def _chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, variable: str, compiled: str) -> str:
    if request.param == compiled:
        pytest.importorskip("fusechat._native", reason="the compiled engine is not built")
    monkeypatch.setenv(variable, request.param)
    return str(request.param)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put GPUs of these names, or none, where nvidia-smi is looked for."""
    folder = tmp_path / "driver"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(*names: str, mebibytes: int | str = 40_960) -> None:
        lines = [f"{i}, GPU-{i}{i}{i}{i}-aa, {mebibytes}, {name}" for i, name in enumerate(names)]
        tool = folder / "nvidia-smi"
        tool.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines), ""]))
        tool.chmod(0o755)

    return make


@dataclass(frozen=True, kw_only=True)
class TinyWorld:
    """A pivot and a source with different tokenizers and architectures, untrained, and dialogues to fuse on."""

    pivot: Path
    source: Path
    dialogues: Path


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A Llama pivot with byte-level BPE and ChatML, a Qwen2 source with ▁ BPE, byte fallback and [INST]."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("world")
    lines = [" ".join(WORDS[(i * 7 + j * (i + 3)) % len(WORDS)] for j in range(5 + i % 9)) for i in range(24)]
    with (folder / "dialogues.jsonl").open("w") as file:
        for i, line in enumerate(lines):
            turns = [("user", f"Say {line[:9]}?"), ("assistant", line.capitalize() + ".")] * (1 + i % 3 // 2)
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages, "category": "ab"[i % 2]}) + "\n")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    pivot = _save(folder / "pivot", _byte_level(lines), CHATML, "<|im_end|>")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(pivot), hidden_size=32, intermediate_size=48, tie_word_embeddings=True, **sizes)
    ).save_pretrained(folder / "pivot")
    source = _save(folder / "source", _sentencepiece_style(lines), BRACKETS, "</s>")
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(source) + 5, hidden_size=48, intermediate_size=64, **sizes)
    ).save_pretrained(folder / "source")
    return TinyWorld(pivot=folder / "pivot", source=folder / "source", dialogues=folder / "dialogues.jsonl")


def _byte_level(lines: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return tokenizer


def _sentencepiece_style(lines: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, max_token_length=8)
    )
    # The trainer marks byte pieces as special; in a real vocabulary they are ordinary tokens.
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(definition))


def _save(folder: Path, tokenizer: Any, template: str, eos: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def stores(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores of the tiny world: `pivot`, `source`, and `aligned`."""
    from train_world import make_stores

    from fusechat.dialogue import load_dialogues

    return make_stores(tiny_world, load_dialogues(tiny_world.dialogues), tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def reported_run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; copy it before changing anything."""
    import yaml

    from fusechat.run import run

    folder = tmp_path_factory.mktemp("reported")
    values = {
        "pivot": str(tiny_world.pivot),
        "sources": [str(tiny_world.source)],
        "data": {"train": str(tiny_world.dialogues), "held_out_fraction": 0.25},
        "out": str(folder / "run"),
        "extract": {"top_k": 4, "max_length_tokens": 200},
        "train": {"epochs": 4, "batch_size": 6, "micro_batch_size": 6, "learning_rate": 1e-3, "hard_weight": 0.5},
        "merge": {"select_topk": 0.5},
        "eval": {"bootstrap_samples": 100},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    run(folder / "run.yaml")
    return folder / "run"


@pytest.fixture(scope="session")
def judge(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every dialogue with one rating, for real vLLM."""
    from vllm_server import make_judge

    return make_judge(tmp_path_factory.mktemp("judge") / "tiny", tiny_world.pivot)


@pytest.fixture(scope="session")
def judge_server(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The root of the API of a real vLLM server of `judge`: one for all tests, for it takes half a minute to start."""
    from vllm_server import API_KEY, vllm_server

    options = ("--dtype", "float32", "--max-model-len", "512", "--max-logprobs", "8", "--no-enable-prefix-caching")
    names = ("--served-model-name", "judge", "--api-key", API_KEY)
    with vllm_server(judge, tmp_path_factory.mktemp("serve"), *options, *names) as url:
        yield url
