"""Extraction with a real vLLM, in process and as a server: `make test-vllm` runs these in an environment of its own.

The CPU build runs vLLM's V1 worker; on a GPU the same tests run its V2 worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extract_world import check_store, make_hd32_model, manifest, shard_bytes, stores_agree
from vllm_server import API_KEY

import fusechat
from fusechat.demo import fusion, world
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError, FusechatError
from fusechat.extract.backend import open_scorer
from fusechat.extract.child import ChildEngine
from fusechat.extract.fast_driver import kept_tensors
from fusechat.extract.flat_lists import extended_lists
from fusechat.extract.task import open_work
from fusechat.records import Dialogue
from fusechat.store import open_topk, row_positions

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: run `make test-vllm`")


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second process for the engine's core and no compiling: they cost most of a minute a start."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine in this process, not in a child: importing vLLM takes longer than what is tested."""
    monkeypatch.setattr(sys.modules["fusechat.extract"], "engines_of", lambda task, _: [open_work(task, open_scorer)])


@pytest.fixture(scope="module")
def directory(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hd32_model(tmp_path_factory.mktemp("model") / "tiny", tiny_world.pivot)


@pytest.fixture(scope="module")
def dialogues(tiny_world: Any) -> list[Dialogue]:
    return load_dialogues(tiny_world.dialogues)


OPTIONS: dict[str, Any] = {"top_k": 6, "shard_dialogues": 5, "dtype": "float32", "max_length_tokens": 200}


@pytest.fixture(scope="module")
def by_hf(directory: Path, dialogues: list[Dialogue], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "s"
    fusechat.extract(str(directory), dialogues, out, **OPTIONS)
    return out


def _kill_when(out: Path, shards: int, victims: Any) -> Any:
    """A progress callback that kills a process when so many shards are there."""

    def progress(done: int, total: int) -> None:
        if len(list(out.glob("*.safetensors"))) == shards:
            for pid in victims():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    return progress


def _descendants(pid: int) -> list[int]:
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [d for child in children for d in (*_descendants(child), child)]


def test_rows_are_the_models_own_and_a_killed_engine_resumes(
    directory: Path, dialogues: list[Dialogue], by_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's core runs in a process of its own here, as by default, and is what gets killed, in mid run."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    children: list[ChildEngine] = []
    enter = ChildEngine.__enter__
    monkeypatch.setattr(ChildEngine, "__enter__", lambda self: (children.append(self), enter(self))[1])
    out = tmp_path / "s"
    kill = _kill_when(out, 2, lambda: _descendants(children[0].process.pid))
    with pytest.raises(FusechatError, match=r"the vllm engine of .* (failed|died)"):
        fusechat.extract(str(directory), dialogues, out, backend="vllm", progress=kill, **OPTIONS)
    made = shard_bytes(out)
    assert 2 <= len(made) < 5
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    fusechat.extract(str(directory), dialogues, out, backend="vllm", fast_driver=True, **OPTIONS)
    assert made.items() <= shard_bytes(out).items()
    check_store(out, directory)
    stores_agree(out, by_hf)
    (engine,) = manifest(out)["engines"]
    assert (engine["name"], engine["dtype"], engine["quantization"]) == ("vllm", "float32", None)
    assert engine["version"]


@pytest.mark.parametrize("name", ["stories260K-hd32", "babyllama-tok105-hd32", "aidreams231K-hd32"])
@pytest.mark.usefixtures("in_process")
def test_real_models_agree_with_hf(shared_data: Path, tmp_path: Path, name: str) -> None:
    model = shared_data / "models" / name
    text = shared_data / "derived" / "tinystories_dev.txt"
    stories = load_dialogues(text, separator="<|endoftext|>", max_bytes=400, limit=24)
    options: Any = {"top_k": 10, "dtype": "float32", "max_length_tokens": 500}
    fusechat.extract(str(model), stories, tmp_path / "hf", **options)
    fusechat.extract(str(model), stories, tmp_path / "vllm", backend="vllm", **options)
    stores_agree(tmp_path / "vllm", tmp_path / "hf")
    check_store(tmp_path / "vllm", model)


@pytest.mark.usefixtures("in_process")
def test_every_row_is_of_the_token_after_it(tiny_world: Any, tmp_path: Path) -> None:
    """Computed by hand: a model without layers whose head follows the cycle id → id + 1 of its embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path / "cycle"
    shutil.copytree(tiny_world.pivot, directory)
    size = int(json.loads((directory / "config.json").read_text())["vocab_size"])
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(size, 64), dim=1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.copy_(4.0 * embedding.roll(1, 0))
    model.save_pretrained(directory)
    some = load_dialogues(tiny_world.dialogues)[:4]
    fusechat.extract(str(directory), some, tmp_path / "s", backend="vllm", top_k=1, dtype="float32")
    store = open_topk(tmp_path / "s")
    assert len(store) == 4
    for index in store:
        record = store[index]
        rows = row_positions(record["token.loss_mask"])
        np.testing.assert_array_equal(record["row.ids"][:, 0], (record["token.input_ids"][rows] + 1) % size)


def test_a_real_server_agrees_with_hf(
    judge_server: str, judge: Path, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    fusechat.extract(str(judge), dialogues, tmp_path / "hf", **OPTIONS)
    options = OPTIONS | {"backend": "vllm-server", "servers": [judge_server]}
    manifest = fusechat.extract(str(judge), dialogues, tmp_path / "s", **options, served_model="judge")
    check_store(tmp_path / "s", judge)
    stores_agree(tmp_path / "s", tmp_path / "hf")
    assert manifest["engines"][0]["version"]
    with pytest.raises(FusechatError, match="refuses"):
        fusechat.extract(str(judge), dialogues, tmp_path / "t", **options | {"top_k": 9}, served_model="judge")
    with pytest.raises(FusechatError, match=r"serves judge, not another"):
        fusechat.extract(str(judge), dialogues, tmp_path / "t", **options, served_model="another")


@pytest.mark.usefixtures("in_process")
def test_what_vllm_refuses_is_one_line(directory: Path, dialogues: list[Dialogue], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refuses") as error:
        fusechat.extract(
            str(directory), dialogues, tmp_path / "s", backend="vllm", engine_args={"no_such_argument": 1}, **OPTIONS
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


def test_this_vllm_takes_both_patches() -> None:
    with extended_lists() as replaced, kept_tensors():
        assert replaced


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_demo_of_few_steps_runs_on_vllm_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its four models of three architectures, and every stage behind them; what comes of it is the slow test's."""
    few = {"train_dialogues": 32}
    monkeypatch.setattr(world, "TRAIN_DIALOGUES", 32)
    monkeypatch.setattr(world, "HELD_OUT_DIALOGUES", 40)
    monkeypatch.setattr(world, "PIVOT", replace(world.PIVOT, **few))
    monkeypatch.setattr(world, "SOURCES", tuple(replace(spec, **few) for spec in world.SOURCES))
    monkeypatch.setitem(fusion.SETTINGS, "train", fusion.SETTINGS["train"] | {"epochs": 1})
    outcome = fusion.fuse_demo(tmp_path, backend="vllm")
    assert outcome.answers.keys() == {"pivot", "SFT", "merged"}
    assert "merged" in outcome.results["groups"]["overall"]["models"]
    stores = sorted((tmp_path / "run" / "extract").iterdir())
    assert len(stores) == 4
    for store in stores:
        assert [engine["name"] for engine in manifest(store)["engines"]] == ["vllm"]


@pytest.mark.slow
def test_the_demo_runs_on_vllm(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusechat", "demo", "--backend", "vllm", "--out", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("pivot", "neox-numbers"):
        found = manifest(tmp_path / "demo" / "run" / "extract" / name)
        assert [engine["name"] for engine in found["engines"]] == ["vllm"]
