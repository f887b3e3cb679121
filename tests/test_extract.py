"""The extracted rows against the model's own full log-softmax, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extract_world import check_store, shard_bytes
from safetensors.torch import load_file, save_file

import fusechat
from fusechat.artifact import ShardedWriter
from fusechat.dialogue import load_dialogues
from fusechat.errors import DataError, FusechatError, MismatchError
from fusechat.extract import left_out
from fusechat.extract.batches import length_batches
from fusechat.extract.hf import open_hf
from fusechat.extract.task import Shard, Task, open_work
from fusechat.model import check_head, load_model
from fusechat.records import Dialogue, Message
from fusechat.store import open_topk, row_positions


@pytest.fixture(scope="module")
def dialogues(tiny_world: Any) -> list[Dialogue]:
    return load_dialogues(tiny_world.dialogues)


@pytest.mark.parametrize("side", ["pivot", "source"])
def test_rows_are_the_models_own_full_softmax(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, side: str
) -> None:
    """Position by position, without padding or batching: an off-by-one, a padding leak or a wrong gold shows here."""
    directory = getattr(tiny_world, side)
    fusechat.extract(str(directory), dialogues, tmp_path / "s", top_k=7, batch_tokens=200, shard_dialogues=5)
    store = open_topk(tmp_path / "s")
    assert len(store) == len(dialogues)
    model = load_model(directory)
    for index in store:
        record = store[index]
        ids = torch.from_numpy(record["token.input_ids"].astype(np.int64))
        with torch.no_grad():
            full = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)
        rows = row_positions(record["token.loss_mask"])
        assert len(rows) == len(record["row.ids"]) > 0
        expected = full[torch.from_numpy(rows)]
        got = expected.gather(1, torch.from_numpy(record["row.ids"].astype(np.int64)))
        np.testing.assert_allclose(record["row.logprobs"], got.numpy(), rtol=1e-3, atol=1e-4)
        assert np.allclose(np.sort(got.numpy())[:, ::-1], expected.topk(7).values.numpy(), atol=1e-5)
        gold = expected.gather(1, ids[torch.from_numpy(rows) + 1][:, None])[:, 0]
        np.testing.assert_allclose(record["row.gold_logprob"], gold.numpy(), atol=1e-5)


def test_float32_rows_are_the_same_bytes_whatever_the_batch_the_shard_and_the_order(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    """Catches padding, or rows of another sequence, that reach a row's last bits."""

    def rows(name: str, some: list[Dialogue], **options: Any) -> list[bytes]:
        fusechat.extract(str(tiny_world.source), some, tmp_path / name, top_k=3, **options)
        store = open_topk(tmp_path / name)
        return [b"".join(store[i][key].tobytes() for key in store[i] if key != "dialogue.index") for i in store]

    whole = rows("whole", dialogues)
    assert rows("tiny-batches", dialogues, batch_tokens=1) == whole
    assert rows("shards", dialogues, shard_dialogues=5) == whole
    assert rows("backwards", dialogues[::-1], shard_dialogues=7) == whole[::-1]
    assert rows("placed", dialogues, device_map="cpu") == whole


def test_half_precision_batches_by_length_and_stays_close(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    for name, dtype, batch in (("exact", "float32", 1), ("many", "bfloat16", 8192)):
        fusechat.extract(str(tiny_world.source), dialogues, tmp_path / name, dtype=dtype, batch_tokens=batch)
    exact, many = open_topk(tmp_path / "exact"), open_topk(tmp_path / "many")
    assert many.manifest["dtype"] == "bfloat16"
    for index in exact:
        np.testing.assert_allclose(exact[index]["row.gold_logprob"], many[index]["row.gold_logprob"], atol=0.05)


def test_a_dialogue_that_one_source_cannot_take_is_listed_and_skipped_for_that_source(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    """The template of this source refuses a system turn, and long dialogues lose turns."""
    picky = tmp_path / "picky"
    shutil.copytree(tiny_world.source, picky)
    refusal = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refusal += "{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (picky / "refuse.jinja").write_text(refusal)
    system = Dialogue(messages=(Message(role="system", content="Be brief."), *dialogues[0].messages))
    turns = (Message(role="user", content="the cat?"), Message(role="assistant", content="the cat sat on a mat."))
    some = [*dialogues[:3], system, Dialogue(messages=turns * 9)]
    options: Any = {"max_length_tokens": 70, "shard_dialogues": 2, "template": str(picky / "refuse.jinja")}
    manifest = fusechat.extract(str(picky), some, tmp_path / "s", **options)
    assert manifest["skipped"] == {"3": "the template refuses it: no system"}
    assert set(manifest["cut_turns"]) == {"4"}
    store = open_topk(tmp_path / "s")
    assert sorted(store) == [0, 1, 2, 4]
    assert left_out(manifest) == ", 1 dialogues skipped (1 × the template refuses it: no system), 1 cut"
    with pytest.raises(DataError, match=r"no dialogue can be encoded.*no system"):
        fusechat.extract(str(picky), [system], tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_in_mid_shard_is_one_line_and_the_run_resumes(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusechat.extract import task

    fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "whole", shard_dialogues=5)
    write = task.write_block

    def full(path: Path, block: Any) -> None:
        if "shard-00002" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(path, block)

    monkeypatch.setattr(task, "write_block", full)
    with pytest.raises(fusechat.errors.FusechatError, match="No space left on device; free space"):
        fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", shard_dialogues=5)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 2
    assert not list((tmp_path / "s").glob("*.partial"))
    monkeypatch.setattr(task, "write_block", write)
    fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", shard_dialogues=5)
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "whole")


def test_batches_hold_all_sequences_once_and_keep_to_their_budget() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 57).tolist()
    batches = list(length_batches(lengths, 600))
    assert sorted(i for batch in batches for i in batch) == list(range(57))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 600 for batch in batches)
    assert list(length_batches([900], 600)) == [[0]]


def _broken_copy(directory: Path, to: Path, change: Any) -> Path:
    shutil.copytree(directory, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_nan_in_the_logits_is_refused_naming_the_dialogue(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][:] = float("nan")

    broken = _broken_copy(tiny_world.pivot, tmp_path / "nan", poison)
    with pytest.raises(DataError, match="NaN logits on dialogue 0, row 0"):
        fusechat.extract(str(broken), dialogues, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_vocabulary_larger_than_the_embedding_is_refused_naming_both(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    shutil.copytree(tiny_world.source, small)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_world.source / file, small / file)
    config = json.loads((small / "config.json").read_text())
    weights = load_file(small / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = weights[key][:100].clone()
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(DataError, match="100"):
        fusechat.extract(str(small), dialogues, tmp_path / "s")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"no config\.json"),
        (lambda d: (d / "model.safetensors").unlink(), "not a complete model directory"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 999), "truncated or no safetensors"),
        (lambda d: [f.unlink() for f in d.glob("token*")], "no tokenizer that loads"),
    ],
)
def test_broken_model_directories_are_refused_in_one_line(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, damage: Any, message: str
) -> None:
    shutil.copytree(tiny_world.pivot, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(fusechat.errors.FusechatError, match=message) as error:
        fusechat.extract(str(tmp_path / "m"), dialogues, tmp_path / "s")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


def test_more_log_probabilities_than_tokens_are_refused(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"top_k 500 is more than the \d+ tokens"):
        fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", top_k=500)


def test_a_store_of_other_data_is_refused(tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path) -> None:
    fusechat.extract(str(tiny_world.pivot), dialogues[:4], tmp_path / "s")
    with pytest.raises(MismatchError, match="dataset_fingerprint"):
        fusechat.extract(str(tiny_world.pivot), dialogues[:5], tmp_path / "s")


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite", "Phi3", "GPTNeoX", "Mixtral", "Qwen3"])
def test_heads_with_scales_caps_and_routers_give_the_models_own_logits(family: str) -> None:
    import transformers

    sizes = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "GPTNeoX":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    if family == "Granite":
        sizes["logits_scaling"] = 4.0
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    check_head(model, np.arange(20, dtype=np.int32))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16, "query_pre_attn_scalar": 16}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_rows_of_heads_that_change_their_logits_are_the_models_own(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    import transformers

    directory = tmp_path / family
    shutil.copytree(tiny_world.pivot, directory)
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=size + 9, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # so that a cap or a scale matters
        model.get_output_embeddings().weight.mul_(30)
    model.save_pretrained(directory)
    fusechat.extract(str(directory), dialogues[:4], tmp_path / "s", top_k=5, dtype="float32")
    check_store(tmp_path / "s", directory, logprob_atol=2e-5)


def test_an_unknown_change_of_the_logits_is_detected() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Odd(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    with pytest.raises(DataError, match="Odd changes its logits"):
        check_head(model, np.arange(20, dtype=np.int32))


def test_what_changes_the_rounding_is_of_the_request(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a store of two halves that were computed in different batches, or by engines told different things."""
    some = dialogues[:4]
    fusechat.extract(str(tiny_world.pivot), some, tmp_path / "half", dtype="bfloat16", batch_tokens=64)
    with pytest.raises(MismatchError, match="batch_tokens: 64 there, 8192 here"):
        fusechat.extract(str(tiny_world.pivot), some, tmp_path / "half", dtype="bfloat16")
    fusechat.extract(str(tiny_world.pivot), some, tmp_path / "whole", dtype="float32", batch_tokens=64)
    fusechat.extract(str(tiny_world.pivot), some, tmp_path / "whole", dtype="float32")
    monkeypatch.setattr("fusechat.extract.engines_of", lambda task, earlier: [open_work(task, open_hf)])
    vllm: Any = {"backend": "vllm", "dtype": "float32"}  # its settings alone: vLLM need not be here
    fusechat.extract(str(tiny_world.pivot), some, tmp_path / "vllm", engine_args={"seed": 1}, **vllm)
    with pytest.raises(MismatchError, match="engine_args"):
        fusechat.extract(str(tiny_world.pivot), some, tmp_path / "vllm", engine_args={"seed": 2}, **vllm)
    with pytest.raises(MismatchError, match="tensor_parallel_size: null there, 2 here"):
        fusechat.extract(
            str(tiny_world.pivot), some, tmp_path / "vllm", engine_args={"seed": 1}, tensor_parallel_size=2, **vllm
        )


def test_a_store_goes_on_with_what_the_error_advised(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches advice to lower vLLM's share of the memory that the half-made store then refuses."""
    options: Any = {"backend": "vllm", "dtype": "float32", "shard_dialogues": 2}
    made: list[str] = []

    def engines(task: Task, _: Any) -> Any:
        @contextmanager
        def dying() -> Any:
            with open_work(task, open_hf) as work:

                def once(shard: Shard, advance: Any) -> Any:
                    if len(made) == 1:
                        made.append("out of memory")
                        raise FusechatError("out of memory")
                    made.append(shard.name)
                    return work(shard, advance)

                yield once

        return [dying()]

    monkeypatch.setattr("fusechat.extract.engines_of", engines)
    with pytest.raises(FusechatError, match="out of memory"):
        fusechat.extract(str(tiny_world.pivot), dialogues[:4], tmp_path / "s", **options)
    less = {"gpu_memory_utilization": 0.5, "max_num_batched_tokens": 512}
    fusechat.extract(str(tiny_world.pivot), dialogues[:4], tmp_path / "s", engine_args=less, **options)
    assert made == ["shard-00000.safetensors", "out of memory", "shard-00001.safetensors"]


def test_nothing_to_make_starts_no_engine(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model loaded, and GPUs taken, by a run that was killed after its last shard."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", shard_dialogues=7)
    monkeypatch.setattr("fusechat.extract.engines_of", lambda *_: pytest.fail("an engine was started"))
    manifest = fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "s", shard_dialogues=7)
    assert sum(shard["n_dialogues"] for shard in manifest["shards"]) == len(dialogues)


def test_a_shard_of_which_nothing_is_left_is_not_made_again(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an engine started, after a kill, for dialogues that were skipped before."""
    turns = (Message(role="user", content="why?"), Message(role="assistant", content="because. " * 200))
    some = [*dialogues[:2], Dialogue(messages=turns), Dialogue(messages=turns), *dialogues[2:4]]
    options: Any = {"shard_dialogues": 2, "max_length_tokens": 70}
    whole = fusechat.extract(str(tiny_world.pivot), some, tmp_path / "whole", **options)
    assert set(whole["skipped"]) == {"2", "3"}
    assert len(whole["shards"]) == 2

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            fusechat.extract(str(tiny_world.pivot), some, tmp_path / "s", **options)
    monkeypatch.setattr("fusechat.extract.engines_of", lambda *_: pytest.fail("an engine was started"))
    assert fusechat.extract(str(tiny_world.pivot), some, tmp_path / "s", **options) == whole
    assert not list((tmp_path / "s").glob("*.safetensors.json"))


def test_the_manifest_says_which_model_by_its_name_and_commit(
    tiny_world: Any, dialogues: list[Dialogue], tmp_path: Path
) -> None:
    """Catches a store whose model can no longer be named once the folder is gone."""
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(tiny_world.pivot, cached)
    for model, revision in ((cached, commit), (tiny_world.pivot, None)):
        manifest = fusechat.extract(str(model), dialogues[:2], tmp_path / f"{revision}")
        assert (manifest["model_id"], manifest["revision"]) == (str(model), revision)
