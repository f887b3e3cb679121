"""What the tests of every extraction backend share: a model with heads that vLLM takes, and what a store must hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.model import load_model
from fusechat.store import open_topk, row_positions


def make_hd32_model(directory: Path, tokenizer_of: Path, *, seed: int = 0, padding: int = 7) -> Path:
    """Write an untrained Qwen2 with heads of 32, an embedding padded beyond the tokenizer, and peaked predictions."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    shutil.copytree(tokenizer_of, directory, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / file, directory / file)
    vocab_size = len(AutoTokenizer.from_pretrained(tokenizer_of)) + padding
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # untrained logits are nearly equal, and hide a wrong position
        model.lm_head.weight.mul_(20)
    model.save_pretrained(directory)
    return directory


def check_store(store_directory: Path, model_directory: Path, *, logprob_atol: float = 1e-4) -> None:
    """Compare every row with the model's own full log-softmax, one sequence at a time, without any of our batching.

    Ids agree in order on at least 99.9 % of entries; the rest are near ties. The gold log-probability is minus the
    cross-entropy of the next token: an off-by-one shows at once.
    """
    store = open_topk(store_directory)
    model = load_model(model_directory, dtype="float32")
    same = entries = 0
    for index in store:
        record = store[index]
        ids = torch.from_numpy(record["token.input_ids"].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        rows = torch.from_numpy(row_positions(record["token.loss_mask"]))
        assert len(rows) == len(record["row.ids"]) > 0
        gold = -torch.nn.functional.cross_entropy(logits[rows], ids[rows + 1], reduction="none")
        np.testing.assert_allclose(record["row.gold_logprob"], gold.numpy(), atol=logprob_atol)
        full = torch.log_softmax(logits[rows], dim=-1)
        k = record["row.ids"].shape[1]
        best = full.topk(k)
        found = torch.from_numpy(record["row.ids"].astype(np.int64))
        same += int((best.indices == found).sum())
        entries += found.numel()
        own = full.gather(1, found)
        # What is stored is float16: 2⁻¹¹ of the value on top of the backend's own error.
        np.testing.assert_allclose(record["row.logprobs"], own.numpy(), rtol=2**-11, atol=logprob_atol)
        np.testing.assert_allclose(own.numpy(), best.values.numpy(), atol=2 * logprob_atol)
    assert same >= 0.999 * entries, (same, entries)


def stores_agree(left: Path, right: Path) -> None:
    """Assert that two stores of one model hold the same rows within what two programs may differ by."""
    a, b = open_topk(left), open_topk(right)
    assert list(a) == list(b)
    assert a.manifest["skipped"] == b.manifest["skipped"]
    same = entries = 0
    for index in a:
        x, y = a[index], b[index]
        for key in ("token.input_ids", "token.loss_mask", "token.turn", "token.byte_end"):
            np.testing.assert_array_equal(x[key], y[key])
        same += int((x["row.ids"] == y["row.ids"]).sum())
        entries += x["row.ids"].size
        np.testing.assert_allclose(x["row.gold_logprob"], y["row.gold_logprob"], atol=1e-4)
    assert same >= 0.999 * entries


def shard_bytes(store: Path) -> dict[str, bytes]:
    """Return every shard's content by name."""
    return {path.name: path.read_bytes() for path in sorted(store.glob("*.safetensors"))}


def manifest(store: Path) -> Any:
    """Return a store's manifest."""
    return json.loads((store / "manifest.json").read_text())
