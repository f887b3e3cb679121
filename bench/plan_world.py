"""A pivot and a source of a chosen size, untrained, and dialogues of some hundred tokens: the plan's benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fusechat.demo.grammar import TOPICS, Facts, dialogues
from fusechat.demo.models import save_model
from fusechat.demo.tokenizers import KINDS

SIZES: dict[str, dict[str, int]] = {
    "22M": {"hidden": 384, "layers": 6, "heads": 6, "vocab": 16_000},
    "89M": {"hidden": 768, "layers": 8, "heads": 12, "vocab": 24_000},
}
CONTEXT_TOKENS = 1024
N_DIALOGUES = 16


def write_world(folder: Path, size: str) -> Path:
    """Write two models, dialogues and the YAML of their fusion; returns the YAML's path."""
    config = folder / "fusion.yaml"
    if config.exists():
        return config
    folder.mkdir(parents=True, exist_ok=True)
    talks = [d.messages for d in dialogues(Facts(0), dict.fromkeys(TOPICS, 1.0), N_DIALOGUES * 9, "plan")]
    texts = [m.content for messages in talks for m in messages]
    with (folder / "dialogues.jsonl").open("w", encoding="utf-8") as file:
        for i in range(N_DIALOGUES):
            joined = [m for messages in talks[9 * i : 9 * i + 4 + i % 6] for m in messages]
            file.write(json.dumps({"messages": [{"role": m.role, "content": m.content} for m in joined]}) + "\n")
    for name, kind in (("pivot", "byte_level_with_headers"), ("source", "sentencepiece_bpe")):
        tokenizer = KINDS[kind](texts, 600)
        save_model(_model(name, tokenizer, **SIZES[size]), tokenizer, folder / name)
    values = {
        "pivot": "pivot",
        "sources": ["source"],
        "data": {"train": "dialogues.jsonl", "held_out_fraction": 0.1},
        "out": "run",
        "extract": {"max_length_tokens": CONTEXT_TOKENS, "batch_tokens": 4096},
        "train": {
            "epochs": 1,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-4,
            "loss_budget_bytes": 64 << 20,
        },
    }
    config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return config


def _model(name: str, tokenizer: Any, *, hidden: int, layers: int, heads: int, vocab: int) -> Any:
    """Return an untrained model with grouped heads; the pivot a Llama, the source a Qwen2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "intermediate_size": 8 * hidden // 3 // 64 * 64,
        "max_position_embeddings": CONTEXT_TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "pivot":
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
