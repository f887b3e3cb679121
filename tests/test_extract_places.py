"""Where engines run: the GPUs of each, by what holds the model, as the plan says it, and vLLM's step beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusechat.config import ExtractConfig
from fusechat.errors import ConfigError
from fusechat.extract.backend import device_groups, engines_of
from fusechat.extract.budget import MAX_BATCHED_TOKENS, max_batched_tokens, prompt_logprob_bytes
from fusechat.extract.task import Task
from fusechat.extract.tensor_parallel import splits
from fusechat.extract.vllm import engine_arguments
from fusechat.model_shape import shape_of_directory
from fusechat.plan.extraction import plan_extraction
from fusechat.plan.hardware import load_hardware
from fusechat.plan.workload import Lengths
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer


def test_gpus_without_number_are_no_endless_search(seven_billion: Task) -> None:
    shape, _ = shape_of_directory(seven_billion.directory)
    assert splits(shape, 10**12) == [1, 2, 4, 8, 16, 32]


def test_devices_are_divided_into_engines() -> None:
    def seen(*arguments: Any) -> list[str]:
        return [group["CUDA_VISIBLE_DEVICES"] for group in device_groups(*arguments)]

    assert seen(["0", "1", "2", "3", "4"], 2, None) == ["0,1", "2,3"]
    assert seen(["3", "GPU-aa"], 1, None) == ["3", "GPU-aa"]
    assert seen(["0", "1"], 1, 1) == ["0"]
    assert device_groups([], 1, None) == [{}]
    assert device_groups([], 1, 2) == [{}, {}]
    for wrong in ((["0"], 2, None), (["0", "1"], 1, 3)):
        with pytest.raises(ConfigError, match=r"do not fit the \d that are visible"):
            device_groups(*wrong)


@pytest.fixture
def seven_billion(tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """An extraction by vLLM of a model of 7 billion parameters of which only the config is here."""
    monkeypatch.setattr("fusechat.extract.vllm.require_vllm", lambda: None)
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = {"model_type": "mistral", "intermediate_size": 14336, "vocab_size": 32_000, "dtype": "bfloat16", **sizes}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return Task(
        model="seven", directory=tmp_path / "model", out=tmp_path / "s", config=ExtractConfig(backend="vllm"),
        template=load_template(load_tokenizer(tiny_world.pivot), "own"), vocab_size=32_000, max_length_tokens=2048,
        dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize(("gigabytes", "size"), [(6, 4), (12, 2), (24, 1), (80, 1)])
def test_a_model_is_spread_over_as_few_gpus_as_hold_it_and_the_plan_says_so(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch, gigabytes: int, size: int
) -> None:
    gpus(*["NVIDIA Z"] * 4, mebibytes=gigabytes * 1024)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    made: Any = engines_of(seven_billion, [])
    groups = [",".join("0123"[i : i + size]) for i in range(0, 4, size)]
    assert [engine.environment["CUDA_VISIBLE_DEVICES"] for engine in made] == groups
    assert {engine.task.config.tensor_parallel_size for engine in made} == {size}
    asked = seven_billion.config.model_copy(update={"tensor_parallel_size": 4})
    assert len(engines_of(replace(seven_billion, config=asked), [])) == 1
    shape, _ = shape_of_directory(seven_billion.directory)
    hardware = load_hardware(None)
    lengths = Lengths(n_dialogues=9, sample=np.full(9, 500), row_share=0.75, distinct_ids=9)
    planned = plan_extraction("seven", shape, lengths, seven_billion.config, hardware, 0)
    assert (planned.settings["tensor_parallel_size"], planned.settings["engines"]) == (size, 4 // size)
    assert planned.fits


@pytest.mark.parametrize(("share", "size"), [(0.95, 1), (0.4, 2)])
def test_run_and_plan_spread_a_model_by_the_share_of_a_gpu_that_vllm_is_given(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch, share: float, size: int
) -> None:
    """Catches an engine that is given too little of a GPU for its weights, and a plan that fits by another share."""
    gpus(*["NVIDIA Z"] * 2, mebibytes=24 * 1024)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config = seven_billion.config.model_copy(update={"engine_args": {"gpu_memory_utilization": share}})
    made: Any = engines_of(replace(seven_billion, config=config), [])
    assert {engine.task.config.tensor_parallel_size for engine in made} == {size}
    shape, _ = shape_of_directory(seven_billion.directory)
    lengths = Lengths(n_dialogues=9, sample=np.full(9, 500), row_share=0.75, distinct_ids=9)
    planned = plan_extraction("seven", shape, lengths, config, load_hardware(None), 0)
    arguments = engine_arguments(replace(seven_billion, config=config), on_cpu=False, memory_bytes=24 << 30)
    assert planned.settings["tensor_parallel_size"] == size
    for key in ("gpu_memory_utilization", "max_num_batched_tokens"):
        assert planned.settings[key] == arguments[key]
    assert planned.fits


@pytest.mark.parametrize(
    ("key", "value"),
    [("gpu_memory_utilization", 1.5), ("gpu_memory_utilization", "all"), ("max_num_batched_tokens", 0)],
)
def test_a_share_that_is_none_is_refused_before_anything_starts(seven_billion: Task, key: str, value: Any) -> None:
    config = seven_billion.config.model_copy(update={"engine_args": {key: value}})
    with pytest.raises(ConfigError, match=rf"extract\.engine_args\.{key} is {value!r}: it must be"):
        engine_arguments(replace(seven_billion, config=config), on_cpu=False, memory_bytes=24 << 30)


def test_a_store_goes_on_with_the_size_its_shards_were_made_with(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a store half of whose rows were summed over two GPUs, half over one."""
    gpus(*["NVIDIA Z"] * 4, mebibytes=80 * 1024)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    made: Any = engines_of(seven_billion, [{"name": "vllm", "tensor_parallel_size": 2}])
    assert {engine.task.config.tensor_parallel_size for engine in made} == {2}


def test_where_the_gpus_are_not_known_each_has_an_engine(
    seven_billion: Task, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    gpus("NVIDIA Z", mebibytes=6 * 1024)
    assert len(engines_of(seven_billion, [])) == 2


@given(
    vocab_size=st.integers(100, 300_000), memory_gib=st.integers(1, 200), utilization=st.floats(0.3, 0.95),
    dtype_bytes=st.sampled_from([2, 4]),
)  # fmt: skip
def test_the_step_of_vllm_fits_beside_its_own_memory(
    vocab_size: int, memory_gib: int, utilization: float, dtype_bytes: int
) -> None:
    memory_bytes = memory_gib << 30
    tokens = max_batched_tokens(vocab_size, memory_bytes, dtype_bytes=dtype_bytes, utilization=utilization)
    assert 64 <= tokens <= MAX_BATCHED_TOKENS
    need = prompt_logprob_bytes(tokens, vocab_size, dtype_bytes=dtype_bytes)
    assert tokens == 64 or need <= (1 - utilization) * memory_bytes
    twice = prompt_logprob_bytes(2 * tokens, vocab_size, dtype_bytes=dtype_bytes)
    assert tokens == MAX_BATCHED_TOKENS or twice > 0.7 * (1 - utilization) * memory_bytes


def test_the_known_case_of_running_out_of_memory() -> None:
    """8,192 tokens at V = 152,064 are 7.5 GB: fine on an H200, too much beside 85 % of a 24 GiB card."""
    assert prompt_logprob_bytes(8192, 152_064) == pytest.approx(7.5e9, rel=0.01)
    assert max_batched_tokens(152_064, 139 << 30) == 8192
    assert max_batched_tokens(152_064, 24 << 30) == 2048
    assert max_batched_tokens(32_000, 24 << 30) == 8192
