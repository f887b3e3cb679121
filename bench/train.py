"""The data path of training, and what packing gains on the lengths of real dialogues.

    python bench/train.py [--size small] [--json OUT] [--check]

Equality first: the packed step's loss is the padded step's. One thread; the dialogues' lengths are those of the
instruction data that FUSECHAT_SHARED_DATA names, in Phi-3's tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from fusechat.align import RowKind
from fusechat.align.stage import BYTE_ORDER
from fusechat.artifact import ShardedWriter, sha256_file
from fusechat.bench.claims import Claim, absent, at_least, at_most
from fusechat.bench.report import parser, report, sizes
from fusechat.bench.timing import interleave, ratio
from fusechat.packing import is_packed
from fusechat.store import (
    ALIGNED_FORMAT,
    TOPK_FORMAT,
    TOPK_VERSION,
    Block,
    make_block,
    map_stored,
    open_topk,
    write_block,
)
from fusechat.train.batch import TOKEN_COLUMNS, fusion_batch
from fusechat.train.batches import StepBatches
from fusechat.train.collate import collate
from fusechat.train.dataset import Example, FusionDataset
from fusechat.train.forward import LossSettings, install_loss
from fusechat.train.select import Selection
from fusechat.train.source import open_source
from fusechat.train.targets import Targets

VOCABULARY, K = 32_000, 10
PAPER = {"batch": 8, "length": 2048, "rounds": 25, "dialogues": 64}
SMALL = {"batch": 8, "length": 256, "rounds": 5, "dialogues": 16}
COLLATE_MS = 5.0
# A 7B model's step on one H100 at 40 % of its dense bf16 peak: 6 FLOPs a parameter and token.
STEP_FLOPS_PER_TOKEN, STEP_FLOPS_PER_SECOND = 6 * 7e9, 0.4 * 989e12


def write_stores(folder: Path, n_dialogues: int, length: int) -> tuple[Path, dict[str, Path]]:
    """Write a pivot's store and an aligned one by granularity; every token is the assistant's, so that there are most
    rows, and every eighth row is finer."""
    rng = np.random.default_rng(0)
    n_rows = length - 1

    def distribution() -> dict[str, Any]:
        p = -np.sort(-rng.dirichlet(np.ones(K + 1), n_rows)[:, :K], axis=1)
        return {
            "row.ids": rng.integers(0, VOCABULARY, (n_rows, K)).astype(np.uint16),
            "row.logprobs": np.log(p).astype(np.float16),
            "row.gold_logprob": np.log(rng.random(n_rows)).astype(np.float32),
        }

    # As a run's own: the mask is the turns', and nine gold tokens of ten are of their row's K, so that it lies packed.
    mask, found = np.arange(length) > 0, np.arange(n_rows) % 10 > 0
    pivots, aligned = [], []
    for index in range(n_dialogues):
        input_ids, rows = rng.integers(0, VOCABULARY, length).astype(np.int32), distribution()
        rows["row.ids"][found, 0] = input_ids[1:][found]
        rows["row.gold_logprob"][found] = rows["row.logprobs"][found, 0]
        pivots.append(
            {
                "dialogue.index": np.array([index]),
                "token.input_ids": input_ids,
                "token.loss_mask": mask,
                "token.turn": np.where(mask, 0, -1).astype(np.int32),
                "token.byte_end": np.where(mask, 4 * np.arange(length), -1).astype(np.int32),
                **rows,
            }
        )
        aligned.append(
            {
                "dialogue.index": np.array([index]),
                "dialogue.source_nll": np.array([1000.0], np.float32),
                "dialogue.pivot_nll": np.array([1100.0], np.float32),
                "dialogue.source_tokens": np.array([n_rows], np.int32),
                "dialogue.pivot_tokens": np.array([n_rows], np.int32),
                "dialogue.content_bytes": np.array([4 * length], np.int32),
                "row.kind": np.where(np.arange(n_rows) % 8 == 0, RowKind.FINER, RowKind.SAME).astype(np.uint8),
                **distribution(),
            }
        )

    def write(name: str, request: dict[str, Any], block: Block) -> Path:
        writer = ShardedWriter(folder / name, request)
        writer.add("shard-00000.safetensors", lambda path: write_block(path, block))
        writer.finish()
        return folder / name

    pivot = write("pivot", {"format": TOPK_FORMAT, "version": TOPK_VERSION}, make_block(pivots))
    request = {"format": ALIGNED_FORMAT, "version": 1, "unaligned": "gold"}
    request |= {"pivot_store_sha256": sha256_file(pivot / "manifest.json")}
    chain = make_block(aligned)
    paths = {"chain": write("chain", request | {"granularity": "chain"}, chain)}
    paths["cells"] = write("cells", request | {"granularity": "cells"}, _with_cells(rng, chain))
    save_file({"byte_order": rng.permutation(VOCABULARY).astype(np.int32)}, paths["cells"] / BYTE_ORDER)
    return pivot, paths


def _with_cells(rng: np.random.Generator, block: Block) -> Block:
    """Add prefix cells to the finer rows of an aligned store: K + 2 entries each, half of them ranges."""
    finer = np.cumsum(np.append(0, block["row.kind"] == RowKind.FINER))
    shape = int(finer[-1]), K + 2
    low = rng.integers(0, VOCABULARY - 50, shape).astype(np.int32)
    cells = {
        "cell.ids": rng.integers(0, VOCABULARY, shape).astype(np.uint16),
        "cell.logprobs": np.log(rng.dirichlet(np.ones(K + 3), shape[0])[:, : K + 2]).astype(np.float16),
        "cell.low": low,
        "cell.high": np.where(rng.random(shape) < 0.5, low + 50, 0).astype(np.int32),
    }
    offsets = dict(block.offsets) | {"cell": finer[block.offsets["row"]]}
    return Block(columns=dict(block.columns) | cells, offsets=offsets)


def data_claims(size: dict[str, int]) -> list[Claim]:
    """Time a micro-batch from the memory-mapped stores to tensors, by rule of selection."""
    rules = {
        "min_ce per sequence": (Selection(), "chain"),
        "min_ce per token": (Selection(unit="token"), "chain"),
        "avg_ce per token": (Selection(rule="avg_ce", unit="token"), "chain"),
        "min_ce per sequence, prefix cells": (Selection(), "cells"),
        "min_ce per token, prefix cells": (Selection(unit="token"), "cells"),
    }
    batch, claims = size["batch"], []
    with tempfile.TemporaryDirectory() as temporary:
        pivot_path, paths = write_stores(Path(temporary), batch, size["length"])
        pivot = open_topk(pivot_path)
        assert is_packed(map_stored(pivot_path / "shard-00000.safetensors").columns)
        calls = {}
        for name, (rule, granularity) in rules.items():
            # The pivot and one source: two candidates. Read before, so that the pages are in memory.
            source = open_source(paths[granularity], pivot, "source")
            dataset = FusionDataset(pivot, [source], select=rule, when_pivot_wins="pivot")
            calls[name] = lambda d=dataset: collate([d[i] for i in range(batch)], pad_token_id=0)  # type: ignore[misc]
        assert len(calls["min_ce per sequence"]()["rows"]) == batch * (size["length"] - 1)
        # A training process has freed large buffers before; malloc then keeps small ones instead of returning them.
        np.ones(30 << 20, np.uint8)
        samples = interleave(calls, size["rounds"])
        shape = f"B={batch} × {size['length']:,} tokens, K={K}, two candidates"
        step_s = STEP_FLOPS_PER_TOKEN * batch * size["length"] / STEP_FLOPS_PER_SECOND
        for name in rules:
            milliseconds = 1e3 * samples[name].median_s()
            claims.append(at_most(f"rows and collate, {name}", shape, milliseconds, COLLATE_MS, "ms"))
        share = 100 * samples["min_ce per sequence"].median_s() / step_s
        why = "estimated: 6·7e9 FLOPs a token on one H100 at 40 % of 989 TFLOP/s"
        claims.append(at_most("data path", "a training step of a 7B model", share, 1.0, "%", note=why))
    return claims


def real_lengths(limit_tokens: int) -> list[int] | None:
    """Return the tokens of real instruction dialogues, or None where there are none."""
    folder = Path(os.environ.get("FUSECHAT_SHARED_DATA", ""))
    file = folder / "derived" / "alpaca_en_demo.dev.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "phi-3-mini" / "tokenizer.json"))
    items = json.loads(file.read_text())
    texts = ["\n".join(str(item[key]) for key in ("instruction", "input", "output")) for item in items]
    return [min(max(len(e.ids), 4), limit_tokens) for e in tokenizer.encode_batch(texts)]


def packing_claims(size: dict[str, int]) -> list[Claim]:
    """Time training steps padded and packed on the same dialogues."""
    lengths = real_lengths(size["length"] // 4)
    if lengths is None:
        why = "FUSECHAT_SHARED_DATA names no instruction data"
        return [absent("packed tokens a second", "padded", "≥ 1.1×", why)]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=2048, pad_token_id=0,
        )
    )  # fmt: skip
    install_loss(model, LossSettings(), None)
    rng = np.random.default_rng(0)
    lengths = [lengths[i] for i in rng.permutation(len(lengths))[: size["dialogues"]]]
    examples = [_example(rng, i, length) for i, length in enumerate(lengths)]

    def step(packing: bool) -> float:
        batches = StepBatches(
            lengths, batch_size=len(lengths), micro_batch_size=8, rank=0, n_processes=1, seed=0, packing=packing
        )
        model.zero_grad()
        total = 0.0
        for indices in batches:
            inputs = collate([examples[i] for i in indices], pad_token_id=0, packing=packing)
            tokens = {name: inputs[name] for name in TOKEN_COLUMNS if name in inputs}
            loss = model(**tokens, batch=fusion_batch(inputs, 0.5))["loss"]
            loss.backward()
            total += loss.item()
        return total

    padded_loss, packed_loss = step(False), step(True)
    assert abs(padded_loss - packed_loss) < 1e-4 * abs(padded_loss), (padded_loss, packed_loss)
    samples = interleave({"padded": lambda: step(False), "packed": lambda: step(True)}, max(size["rounds"] // 5, 3))
    n_tokens = sum(lengths)
    rates = {name: n_tokens / s.median_s() for name, s in samples.items()}
    against = f"{rates['packed']:,.0f} against {rates['padded']:,.0f} tokens a CPU-second"
    shape = f"{len(lengths)} dialogues of {min(lengths)}–{max(lengths)} tokens, 8 a forward"
    note = f"{shape}: {against}, sdpa with a block mask"
    return [at_least("packed tokens a second", "padded", ratio(samples, "padded", "packed"), 1.1, note=note)]


def step_claims(rounds: int) -> list[Claim]:
    """Time a training step of the demo's pivot with the fused loss, with torch's own form and with dense targets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    batch, length, vocabulary = 16, 96, 768
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=True, pad_token_id=0,
        )
    )  # fmt: skip
    install_loss(model, LossSettings(missing="renormalise"), None)
    rng = np.random.default_rng(0)
    inputs = collate([_example(rng, i, length, vocabulary) for i in range(batch)], pad_token_id=0)
    rows, hard_weight = fusion_batch(inputs, 0.5), 0.5
    tokens = {name: inputs[name] for name in TOKEN_COLUMNS if name in inputs}

    def step(loss: torch.Tensor) -> float:
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        return loss.item()

    def fused(backend: str) -> float:
        os.environ["FUSECHAT_LOSS"] = backend
        loss = step(model(**tokens, batch=rows)["loss"])
        del os.environ["FUSECHAT_LOSS"]
        return loss / len(rows.labels)

    def dense() -> float:
        logits = model(**tokens).logits.flatten(0, 1)[rows.rows]
        target = torch.zeros_like(logits).scatter_add_(1, rows.ids.long(), torch.softmax(rows.logprobs, 1))
        soft = F.cross_entropy(logits, target)
        return step(hard_weight * F.cross_entropy(logits, rows.labels) + (1 - hard_weight) * soft)

    calls = {"ours": lambda: fused("native"), "torch": lambda: fused("torch"), "dense": dense}
    losses = [call() for call in calls.values()]
    assert max(losses) - min(losses) < 1e-4 * losses[0], losses
    samples = interleave(calls, rounds)
    name = f"a training step of the demo's pivot, {len(rows.labels)} rows, V={vocabulary}"
    note = f"{1e3 * samples['ours'].median_s():.1f} ms"
    return [
        at_least(name, "the loss in torch", ratio(samples, "torch", "ours"), None, note=note),
        at_least(name, "dense targets", ratio(samples, "dense", "ours"), None),
    ]


def _example(rng: np.random.Generator, number: int, length: int, vocabulary: int = 4096) -> Example:
    ids = rng.integers(1, vocabulary, length)
    rows = np.arange(length // 4, length - 1)
    logprobs = np.log(rng.dirichlet(np.ones(K + 1), len(rows))[:, :K])
    return Example(
        dialogue=number,
        input_ids=ids,
        labels=np.where(np.arange(length) > length // 4, ids, -100),
        rows=rows,
        targets=Targets.by(rng.integers(0, vocabulary, (len(rows), K)), logprobs),
        taught=np.ones(len(rows), np.float32),
        row_weight=np.ones(len(rows), np.float32),
        origin=np.zeros(len(rows), np.int64),
    )


def main() -> int:
    """Measure everything and report."""
    options = parser(__doc__ or "").parse_args()
    size = sizes(options.size, SMALL, PAPER)
    torch.set_num_threads(1)
    return report("train", [*data_claims(size), *packing_claims(size), *step_claims(size["rounds"])], options)


if __name__ == "__main__":
    sys.exit(main())
