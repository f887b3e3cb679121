"""TopKStores of random models over short texts, in tokenizers trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fusechat.artifact import ShardedWriter
from fusechat.bytetable import ByteTable, token_byte_ends
from fusechat.store import TOPK_FORMAT, TOPK_VERSION, id_dtype, make_block, write_block

TEXTS = [
    "Once upon a time there was a little girl named Lily.",
    "",
    '  She loved to play outside,\nand 1234 times she said: "é 你好 🦙"!',
    "Then Lily's mom said hello hello hello to the little dog.",
    "The end of the story, the little girl was happy.",
] * 3


def byte_level(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sentencepiece(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=40, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(tree))


def write_store(
    out: Path,
    tokenizer: Tokenizer,
    *,
    k: int,
    per_shard: int,
    seed: int,
    skip: Sequence[int] = (),
    data: str = "d" * 64,
    end: str | None = None,
) -> Path:
    """Write a TopKStore of TEXTS as plain messages, with random rows, as extraction would.

    Turns end with `end`, or with the first token that a turn or a sequence may end with.
    """
    model = out.with_name(out.name + "-model")
    model.mkdir(parents=True)
    tokenizer.save(str(model / "tokenizer.json"))
    table = ByteTable.from_tokenizer(tokenizer, tokenizer.get_vocab_size() + 5)
    rng = np.random.default_rng(seed)
    request = {
        "format": TOPK_FORMAT,
        "version": TOPK_VERSION,
        "dataset_fingerprint": data,
        "tokenizer_sha256": table.sha256,
    }
    writer = ShardedWriter(out, request | {"vocab_size": len(table), "top_k": k, "seed": seed})
    first_end = int(np.flatnonzero(np.isin(table.roles, (2, 3)))[0])
    end_id = first_end if end is None else tokenizer.token_to_id(end)
    kept = [i for i in range(len(TEXTS)) if i not in skip]
    for number, begin in enumerate(range(0, len(kept), per_shard)):
        records = [_record(i, tokenizer, table, end_id, k, rng) for i in kept[begin : begin + per_shard]]
        block = make_block(records)
        writer.add(
            f"shard-{number:05d}.safetensors",
            lambda path, block=block: write_block(path, block),
            n_dialogues=len(records),
            n_rows=len(block["row.ids"]),
        )
    writer.finish(model=str(model))
    return out


def _record(
    index: int, tokenizer: Tokenizer, table: ByteTable, end: int, k: int, rng: np.random.Generator
) -> dict[str, Any]:
    data = TEXTS[index].encode()
    ids = tokenizer.encode(TEXTS[index], add_special_tokens=False).ids
    ends = token_byte_ends(table, ids, data).tolist()
    ids, ends = [0, *ids, end], [-1, *ends, len(data)]
    n = len(ids) - 1
    gold = np.array(ids[1:])
    top = rng.integers(3, tokenizer.get_vocab_size(), (n, k))
    top[:, 1] = gold
    for r in range(n):  # no id twice
        while len(set(top[r])) < k:
            top[r] = [gold[r] if j == 1 else rng.integers(3, tokenizer.get_vocab_size()) for j in range(k)]
    p = np.sort(rng.dirichlet(np.ones(k + 1), n)[:, :k])[:, ::-1]
    logprobs = np.log(p).astype(np.float16)
    return {
        "dialogue.index": np.array([index], np.int64),
        "token.input_ids": np.array(ids, np.int32),
        "token.loss_mask": np.array([False] + [True] * n),
        "token.turn": np.array([-1] + [0] * n, np.int32),
        "token.byte_end": np.array(ends, np.int32),
        "row.ids": top.astype(id_dtype(len(table))),
        "row.logprobs": logprobs,
        "row.gold_logprob": logprobs[:, 1].astype(np.float32),
    }
