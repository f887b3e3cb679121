"""What the extraction benchmarks compute on: a 20M-parameter Llama with V = 32,000, and sequences of mixed lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusechat.records import Encoded

VOCAB_SIZE = 32_000
MAX_TOKENS = 2048


def make_model(directory: Path) -> Path:
    """Write the model (untrained, tied, heads of 64: vLLM takes them on a CPU) and a tokenizer of as many words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=1024, num_hidden_layers=11, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=MAX_TOKENS + 1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # untrained logits are all but equal: no top k to speak of
        model.model.norm.weight.mul_(10)
    model.save_pretrained(directory)
    save_tokenizer(directory, VOCAB_SIZE)
    return directory


def save_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer of so many tokens: the bytes, and words that no text is split into."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"word{i}" for i in range(vocab_size - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def sequences(count: int, *, seed: int = 0) -> list[Encoded]:
    """Return dialogues in random tokens, lengths lognormal (mean 457, as instruction data has them), three quarters of
    the tokens the assistant's."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(5.86, 0.74, count)), 16, MAX_TOKENS).astype(int)
    return [sequence(int(n), rng) for n in lengths]


def sequence(n: int, rng: np.random.Generator) -> Encoded:
    """Return one dialogue of n tokens."""
    mask = np.arange(n) >= n // 4
    byte_end = np.where(mask, np.cumsum(rng.integers(1, 9, n) * mask), -1)
    return Encoded(
        input_ids=rng.integers(0, VOCAB_SIZE, n, dtype=np.int32),
        loss_mask=mask,
        turn=np.where(mask, 0, -1).astype(np.int32),
        byte_end=byte_end.astype(np.int32),
    )


def n_tokens(encoded: list[Encoded]) -> int:
    """Return the number of tokens of all sequences."""
    return sum(len(member.input_ids) for member in encoded)


def load(directory: Path) -> Any:
    """Load the model in float32 on the CPU."""
    from fusechat.model import load_model

    return load_model(directory, dtype="float32", device="cpu")
