"""What a plan counts, against the implementations: parameters, FLOPs, what a forward pass keeps, bytes of a store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusechat.config import ExtractConfig
from fusechat.errors import DataError, FormatError
from fusechat.extract.facts import model_facts
from fusechat.extract.tensor_parallel import weight_bytes
from fusechat.model_shape import (
    ModelShape,
    count_parameters,
    forward_flops,
    kv_bytes_per_token,
    shape_from_config,
    stored_bytes,
)
from fusechat.plan.extraction import hf_parts, plan_extraction, store_bytes
from fusechat.plan.hardware import load_hardware, this_computer
from fusechat.plan.models import model_shape, shipped_models
from fusechat.plan.training_memory import activation_bytes, lora_parameters
from fusechat.plan.workload import Lengths, Workload, lengths
from fusechat.store import id_dtype, make_block, row_positions, write_block

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 500,
    "max_position_embeddings": 64,
}
CHAT = Lengths(n_dialogues=20, sample=np.array([60, 20, 40, 30]), row_share=0.75, distinct_ids=100)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"tie_word_embeddings": False, "head_dim": 24}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
    ("gemma2", {"tie_word_embeddings": True, "head_dim": 20}),
    ("phi3", {"tie_word_embeddings": False, "pad_token_id": 0}),
    ("gpt_neox", {"tie_word_embeddings": False}),
    ("mixtral", {"tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2}),
]


def build(family: str, options: dict[str, Any], device: str = "meta") -> tuple[Any, ModelShape]:
    """Return a model, on the meta device without memory, and its shape by its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in SIZES.items() if family != "gpt_neox" or key != "num_key_value_heads"}
    config = AutoConfig.for_model(family, **sizes, **options)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    return model, shape_from_config(family, config.to_dict())


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_parameters_are_the_implementation_s(family: str, options: dict[str, Any]) -> None:
    model, shape = build(family, options)
    assert shape.known
    assert count_parameters(shape) == model.num_parameters()


@pytest.mark.parametrize(("family", "options"), [v for v in VARIANTS if v[0] in ("llama", "qwen2", "gpt_neox")])
def test_flops_are_those_torch_counts(family: str, options: dict[str, Any]) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, shape = build(family, options, "cpu")
    model.set_attn_implementation("eager")  # torch does not count the CPU's fused attention
    n, length = 2, 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(n, length, dtype=torch.int64), use_cache=False)
    # torch counts the whole square of an attention; half of it is needed.
    ours = forward_flops(shape, n * length, 2 * length, n * length)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)  # norms and biases are not products


@pytest.mark.parametrize("padded", [False, True])
def test_a_forward_pass_keeps_what_is_counted(padded: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).train()
    ids = torch.ones(4, 64, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 40:] = 1 - padded
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, so that no address is given twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    shape = shape_from_config("llama", config.to_dict())
    counted = activation_bytes(shape, 256, item=4, checkpointing=False, mask_tokens=64 * padded)
    assert counted == pytest.approx(measured, rel=0.05)


def test_adapters_are_peft_s() -> None:
    peft = pytest.importorskip("peft")
    model, shape = build("llama", {"tie_word_embeddings": False})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora_parameters(shape, 3) == trained


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("openchat/openchat_3.5", 7_241_748_480),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704),
        ("internlm/internlm2-chat-20b", 19_861_149_696),
        ("Qwen/Qwen1.5-72B-Chat", 72_287_920_128),
        ("NousResearch/Nous-Hermes-2-SOLAR-10.7B", 10_731_540_480),
    ],
)
def test_the_paper_s_models_have_their_published_sizes(model: str, published: int) -> None:
    shape, where = model_shape(model)
    assert where == "shipped facts"
    assert count_parameters(shape) == published
    assert model in shipped_models()


def test_quantised_weights_keep_their_ends_wide() -> None:
    shape, _ = model_shape("Qwen/Qwen1.5-72B-Chat")
    assert 144e9 < stored_bytes(shape) < 145e9
    assert 39e9 < stored_bytes(shape, "int4") < 41e9
    assert kv_bytes_per_token(shape) == 2 * 80 * 64 * 128 * 2


@pytest.mark.parametrize("device", ["cpu", "a100-40"])
def test_a_quantised_source_is_planned_by_its_header(tmp_path: Path, device: str) -> None:
    """AWQ's layers are int32, its scales, norms and ends float16; most bytes are int32."""
    hidden, vocab = 64, 100
    stored = {
        "model.embed_tokens.weight": ("F16", [vocab, hidden]), "lm_head.weight": ("F16", [vocab, hidden]),
        "model.layers.0.mlp.up_proj.qweight": ("I32", [hidden * 16, hidden]),
        "model.layers.0.mlp.up_proj.scales": ("F16", [hidden, 4]),
    }  # fmt: skip
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in stored.items():
        begin, end = end, end + (4 if dtype == "I32" else 2) * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    config = {
        "model_type": "qwen2",
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "awq", "bits": 4},
    }
    sizes = SIZES | {"hidden_size": hidden, "vocab_size": vocab, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    found, _ = model_shape(str(tmp_path))
    assert (found.dtype, found.quantisation, found.weight_bytes) == ("float16", "awq", end)
    hardware = load_hardware(device) if device != "cpu" else this_computer()
    for backend in ("hf", "vllm"):
        for dtype in ("auto", "float32"):  # what it computes in changes nothing of what is stored
            settings = ExtractConfig(backend=backend, dtype=dtype)
            row = plan_extraction("awq", found, CHAT, settings, hardware, 10**8)
            assert (row.device_parts or row.host_parts)["weights"] == end
            assert row.fits


def test_extraction_holds_one_shard_of_the_data_as_it_is_mixed() -> None:
    shape, _ = model_shape("openchat/openchat_3.5")
    workload = Workload(
        train=None, n_train=95_000, n_validation=0, n_held_out=0, bytes_per_dialogue=2400.0, assumptions=("",)
    )
    found, how = lengths(workload, "openchat/openchat_3.5", ExtractConfig(), 8192)
    assert how == "assumed"
    assert found.sample[0] == found.longest
    assert found.sample[:512].mean() == pytest.approx(found.sample.mean(), rel=0.05)
    results = hf_parts(shape, found, ExtractConfig(), 0)["results"]
    by_hand = 512 * found.sample.mean() * (13 + 0.75 * (10 * 14 + 8))
    assert results == pytest.approx(by_hand, rel=1e-3)
    assert hf_parts(shape, found, ExtractConfig(shard_dialogues=64), 0)["results"] == pytest.approx(
        results / 8, rel=0.01
    )
    few = replace(found, n_dialogues=32)
    assert hf_parts(shape, few, ExtractConfig(), 0)["results"] == pytest.approx(results / 16, rel=0.01)


@pytest.mark.parametrize(("vocab", "top_k"), [(32_000, 10), (32_000, 3), (152_064, 10)])
@pytest.mark.parametrize("gold_among_top", [0.0, 0.2, 0.85, 1.0])
def test_a_store_is_as_large_as_counted(tmp_path: Path, vocab: int, top_k: int, gold_among_top: float) -> None:
    rng = np.random.default_rng(0)
    records = []
    lengths_written, n_turns = rng.integers(20, 400, 300), 0
    for i, n in enumerate(lengths_written):
        ends = np.sort(rng.choice(np.arange(2, n), 2 * rng.integers(1, 4), replace=False))  # of prompts and answers
        turn = np.full(n, -1, np.int32)
        for number, (begin, end) in enumerate(ends.reshape(-1, 2)):
            turn[begin:end] = number
        n_turns += len(ends) // 2
        ids = rng.integers(0, vocab, n, dtype=np.int32)
        gold = ids[row_positions(turn >= 0) + 1]
        row_ids = rng.integers(0, vocab, (len(gold), top_k)).astype(id_dtype(vocab))
        logprobs = -np.sort(rng.exponential(2.0, row_ids.shape), axis=1).astype(np.float32)
        gold_logprob = np.full(len(gold), -13.7, np.float32)
        among = rng.random(len(gold)) < gold_among_top
        row_ids[among, -1], gold_logprob[among] = gold[among], logprobs[among, -1]
        width = rng.integers(1, 9, n) * (turn >= 0)
        before = np.maximum.accumulate(np.where(turn >= 0, 0, np.cumsum(width)))
        records.append(
            {
                "dialogue.index": np.array([i]),
                "token.input_ids": ids,
                "token.loss_mask": turn >= 0,
                "token.turn": turn,
                "token.byte_end": np.where(turn >= 0, np.cumsum(width) - before, -1).astype(np.int32),
                "row.ids": row_ids,
                "row.logprobs": logprobs.astype(np.float16),
                "row.gold_logprob": gold_logprob,
            }
        )
    write_block(tmp_path / "shard", make_block(records))
    n_rows = sum(len(r["row.ids"]) for r in records)
    found = Lengths(
        n_dialogues=300,
        sample=lengths_written,
        row_share=n_rows / int(lengths_written.sum()),
        distinct_ids=1,
        turns_per_dialogue=n_turns / 300,
    )
    size = (tmp_path / "shard").stat().st_size
    assert store_bytes(found, vocab, top_k, gold_among_top) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_attention_heads": 0}, "says num_attention_heads: 0, which must be a whole number above 0"),
        ({"intermediate_size": [1, 2]}, r"says intermediate_size: \[1, 2\], which must"),
        ({"num_key_value_heads": 64}, "says num_key_value_heads: 64, of 6 heads"),
        ({"num_local_experts": 8, "num_experts_per_tok": 9}, "says num_experts_per_tok: 9, of 8 experts"),
    ],
)
def test_a_config_that_is_no_language_model_s_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"the config of thing {said}"):
        shape_from_config("thing", SIZES | {"model_type": "mixtral"} | changed)


def test_local_models_are_read_by_their_headers(tiny_world: Any, tmp_path: Path) -> None:
    shape, where = model_shape(str(tiny_world.pivot))
    assert where == "its headers"
    assert shape.weight_bytes == count_parameters(shape) * 4
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(DataError, match=r"has no config\.json"):
        model_shape(str(folder))
    (folder / "config.json").write_text((tiny_world.source / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((tiny_world.pivot / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="not of one model"):
        model_shape(str(folder))
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match="truncated or no safetensors"):
        model_shape(str(folder))
    with pytest.raises(DataError, match="does not exist"):
        model_shape("./nowhere")


@pytest.mark.parametrize(
    ("stated", "computed"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({}, "float32")],
)
def test_plan_and_extraction_compute_in_one_dtype(
    tiny_world: Any, tmp_path: Path, stated: dict[str, str], computed: str
) -> None:
    """Catches a plan by the headers, float32 here, of a run by config.json."""
    config = json.loads((tiny_world.pivot / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")} | stated
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny_world.pivot / "model.safetensors")
    shape, _ = model_shape(str(tmp_path))
    assert shape.dtype == model_facts(tmp_path, ExtractConfig()).dtype == computed
    item = {"float32": 4}.get(computed, 2)
    assert weight_bytes(shape, ExtractConfig(backend="vllm")) == item * count_parameters(shape)
    assert stored_bytes(shape) == 4 * count_parameters(shape)
