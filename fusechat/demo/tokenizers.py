"""Four tokenizers of four kinds, trained on the spot, each with its own chat template and special tokens."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\\n\\n' }}{% endif %}"
)


def sentencepiece_bpe(texts: Sequence[str], vocab_size: int) -> Any:
    """Train a Llama-2-like tokenizer: BPE with ▁ for the space and a byte for what it has no piece for."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # The words are cut here for training only: a ▁ in front of every word, as SentencePiece does.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n.,:?!]+|▁?[.,:?!]|▁|\n"), "isolated")
    tokenizer.decoder = _spaces_and_bytes()
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    definition = json.loads(tokenizer.to_str())
    # Byte tokens are reached through fallback, never by their spelling in a text.
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in specials]
    return _finish(
        Tokenizer.from_str(json.dumps(definition)), LLAMA2_TEMPLATE, bos="<s>", eos="</s>", pad="</s>", unk="<unk>"
    )


def byte_level_bpe(texts: Sequence[str], vocab_size: int) -> Any:
    """Train a Qwen2-like tokenizer: BPE over bytes, ChatML, no BOS."""
    return _finish(
        _byte_level(texts, vocab_size, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        CHATML_TEMPLATE,
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )


def byte_level_with_headers(texts: Sequence[str], vocab_size: int) -> Any:
    """Train a Llama-3-like tokenizer: BPE over bytes, role headers, contents trimmed."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|header|>", "<|end_header|>", "<|eot_id|>"]
    return _finish(
        _byte_level(texts, vocab_size, specials),
        LLAMA3_TEMPLATE,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|end_of_text|>",
    )


def unigram(texts: Sequence[str], vocab_size: int) -> Any:
    """Build a T5-like tokenizer: Unigram with ▁ and a byte for what it has no piece for.

    `UnigramTrainer` gives another vocabulary at every run; this one depends on the texts alone. From all pieces of
    all words, the pieces that the best segmentations use most are kept, twice, with their frequencies as scores.
    """
    specials = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = Counter(
        word for text in texts for word in re.findall(r"▁[^▁\s.,:?!]+|[.,:?!]", "▁" + text.replace(" ", "▁"))
    )
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, len(word) + 1):
                counts[word[start:end]] += count
    characters = sorted({character for word in words for character in word} | {"\n"})
    room = max(0, vocab_size - len(specials) - 256 - len(characters))
    for kept in (4 * room, room):
        longer = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
        tokenizer = Tokenizer(_unigram_model(specials, characters + longer[:kept], counts))
        counts = Counter(dict.fromkeys(characters, 1))
        for word, count in words.items():
            for piece in tokenizer.encode(word).tokens:
                counts[piece] += count
    tokenizer = Tokenizer(_unigram_model(specials, characters + longer[:room], counts))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = _spaces_and_bytes()
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    return _finish(tokenizer, ZEPHYR_TEMPLATE, bos="<s>", eos="</s>", pad="</s>", unk="<unk>")


def _unigram_model(specials: Sequence[str], pieces: Sequence[str], counts: Counter[str]) -> models.Unigram:
    total = sum(counts[piece] for piece in pieces)
    vocab = [(special, 0.0) for special in specials]
    vocab += [(f"<0x{byte:02X}>", math.log(1 / total) - 1) for byte in range(256)]
    vocab += [(piece, math.log(max(counts[piece], 1) / total)) for piece in pieces]
    return models.Unigram(vocab, unk_id=0, byte_fallback=True)


KINDS: dict[str, Callable[[Sequence[str], int], Any]] = {
    "sentencepiece_bpe": sentencepiece_bpe,
    "byte_level_bpe": byte_level_bpe,
    "byte_level_with_headers": byte_level_with_headers,
    "unigram": unigram,
}


def _spaces_and_bytes() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _byte_level(texts: Sequence[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _finish(
    tokenizer: Tokenizer, chat_template: str, *, bos: str | None, eos: str, pad: str, unk: str | None = None
) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None if bos is None else AddedToken(bos, special=True),
        eos_token=AddedToken(eos, special=True),
        pad_token=AddedToken(pad, special=True),
        unk_token=None if unk is None else AddedToken(unk, special=True),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast
