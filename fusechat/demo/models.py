"""Small chat models of three architectures, trained from nothing on dialogues in their own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.bytetable import ByteTable
from fusechat.encode import encode_all
from fusechat.records import Dialogue, Encoded
from fusechat.template import load_template

CONTEXT_TOKENS = 256


def build_model(architecture: str, tokenizer: Any, *, hidden: int, layers: int, heads: int, seed: int) -> Any:
    """Return an untrained model of an architecture with as many embedding rows as the tokenizer has tokens."""
    import torch
    from transformers import (  # fmt: skip
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": architecture != "gpt_neox",
    }
    torch.manual_seed(seed)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=3 * hidden, num_key_value_heads=heads))
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape, intermediate_size=3 * hidden, num_key_value_heads=heads // 2))
    assert architecture == "gpt_neox"
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=4 * hidden, rotary_pct=0.5))


def train_model(
    model: Any,
    tokenizer: Any,
    dialogues: Sequence[Dialogue],
    *,
    learning_rate: float,
    batch_dialogues: int,
    seed: int,
    on_step: Callable[[], None],
) -> float:
    """Train on the assistant's tokens, one pass over the dialogues, and return the mean loss of the last tenth.

    AdamW, a linear rise over the first twentieth and a cosine down to nothing. Batches hold dialogues of like length.
    """
    import torch

    table = ByteTable.from_tokenizer(tokenizer)
    template = load_template(tokenizer)
    encoded = encode_all(dialogues, tokenizer, table, template=template, max_length_tokens=CONTEXT_TOKENS).encoded
    batches = _batches(encoded, batch_dialogues, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup, total = max(1, len(batches) // 20), len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * float(np.cos(np.pi * step / total)))
    )
    losses = []
    model.train()
    for batch in batches:
        ids, mask, labels = (torch.from_numpy(array) for array in _pad(batch))
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        taught = labels[:, 1:] >= 0
        logits = model.get_output_embeddings()(hidden[:, :-1][taught])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][taught])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
        on_step()
    model.eval()
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a Hugging Face model directory, without the library's progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _batches(encoded: Sequence[Encoded], size: int, seed: int) -> list[list[Encoded]]:
    """Return batches of `size` dialogues of like length, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(encoded))
    window = size * 16
    batches = []
    for begin in range(0, len(order), window):
        part = sorted(order[begin : begin + window], key=lambda i: len(encoded[i].input_ids))
        batches += [[encoded[i] for i in part[b : b + size]] for b in range(0, len(part), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _pad(batch: Sequence[Encoded]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return input ids, attention mask and labels (−100 off the assistant's tokens), each int64[B,T]."""
    width = max(len(e.input_ids) for e in batch)
    ids = np.zeros((len(batch), width), np.int64)
    mask = np.zeros((len(batch), width), np.int64)
    labels = np.full((len(batch), width), -100, np.int64)
    for row, e in enumerate(batch):
        ids[row, : len(e.input_ids)] = e.input_ids
        mask[row, : len(e.input_ids)] = 1
        labels[row, : len(e.input_ids)] = np.where(e.loss_mask, e.input_ids, -100)
    return ids, mask, labels
