"""What a merge reads: LoRA adapters, tied heads, vocabularies that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from merge_family import expect, make_family, random_tensors, read_all, recipe, write_model
from safetensors.numpy import save_file

from fusechat.errors import ConfigError, DataError, FormatError
from fusechat.merge import estimate, merge, reference
from fusechat.merge.config import ModelRef
from fusechat.merge.inputs import open_model
from fusechat.merge.verify import verify

F32 = npt.NDArray[np.float32]
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
EMBED = "model.embed_tokens"


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and three targets in different dtypes and shardings."""
    return make_family(tmp_path)


def write_adapter(directory: Path, *, config: dict[str, Any] | None = None, drop: str = "", **modules: Any) -> Path:
    """Write a PEFT LoRA adapter; modules: name with dots as __ → (A, B)."""
    directory.mkdir(exist_ok=True)
    facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(facts | (config or {})))
    tensors = {}
    for module, (a, b) in modules.items():
        name = "base_model.model." + module.replace("__", ".")
        kind = "lora_embedding_" if "embed" in module else "lora_"
        suffix = "" if "embed" in module else ".weight"
        tensors[f"{name}.{kind}A{suffix}"] = a
        tensors[f"{name}.{kind}B{suffix}"] = b
    tensors.pop(drop, None)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def factors(seed: int, rows: int, columns: int, rank: int = 4) -> tuple[F32, F32]:
    """Random A [rank, columns] and B [rows, rank]."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.1, (rank, columns)).astype(np.float32), rng.normal(0, 0.1, (rows, rank)).astype(np.float32)


@pytest.mark.parametrize("written_as", ["plus", "key"])
@pytest.mark.parametrize("scaling", ["alpha", "rslora", "pattern"])
def test_adapters_are_targets(family: dict[str, Path], tmp_path: Path, written_as: str, scaling: str) -> None:
    """Catches a wrong scale, a transposed factor, an update of the wrong tensor, rows cut at a block's edge."""
    a_q, b_q = factors(1, 16, 16)
    a_up, b_up = factors(2, 33, 16)
    a_e, b_e = factors(3, 40, 16)
    config: dict[str, Any] = {"rslora": {"use_rslora": True}, "pattern": {"alpha_pattern": {"q_proj": 2}}}.get(
        scaling, {}
    )
    adapter = write_adapter(
        tmp_path / "adapter",
        config=config,
        **{
            Q.replace(".", "__"): (a_q, b_q),
            UP.replace(".", "__"): (a_up, b_up),
            # an embedding keeps its factors the other way around
            EMBED.replace(".", "__"): (np.ascontiguousarray(b_e.T), np.ascontiguousarray(a_e.T)),
        },
    )
    scale = {"alpha": 2.0, "rslora": 4.0, "pattern": 2.0}[scaling]
    update = {
        f"{Q}.weight": (0.5 if scaling == "pattern" else scale) * b_q.astype(np.float64) @ a_q,
        f"{UP}.weight": scale * b_up.astype(np.float64) @ a_up,
        f"{EMBED}.weight": scale * b_e.astype(np.float64) @ a_e,
    }
    by_adapter = f"{family['base']}+{adapter}"
    models: list[Any] = [{"model": str(family["a"])}, {"model": by_adapter}]
    if written_as == "key":
        models[1] = {"model": str(family["base"]), "adapter": str(adapter)}
    merge(recipe(family, models=models), tmp_path / "out")

    def formula(name: str, base: F32, targets: F32) -> npt.NDArray[np.float64]:
        moved = (base + update[name].ravel()).astype(np.float32) if name in update else base
        return reference.sce(base, np.stack([targets[0], moved]), select_topk=0.3, variant="paper")

    expect(family, tmp_path / "out", formula)


def test_an_adapter_of_the_base_counts(tmp_path: Path) -> None:
    """Catches a base whose adapter is read and left out."""
    rng = np.random.default_rng(0)
    base = {"w.weight": rng.normal(0, 1, (501, 333)).astype(np.float32)}
    target = {"w.weight": base["w.weight"] + rng.normal(0, 0.1, (501, 333)).astype(np.float32)}
    paths = {name: write_model(tmp_path / name, model, dtype="F32") for name, model in (("base", base), ("a", target))}
    a, b = factors(1, 501, 333)
    adapter = write_adapter(tmp_path / "adapter", w=(a, b))
    config = recipe(paths, "task_arithmetic", base_model=f"{paths['base']}+{adapter}")
    config["models"] = [{"model": str(paths["a"]), "parameters": {"weight": 0.25}}]
    merge(config, tmp_path / "out", threads=2)
    merged = read_all(tmp_path / "out")["w.weight"]
    moved = base["w.weight"] + 2.0 * b.astype(np.float64) @ a
    np.testing.assert_allclose(merged, moved + 0.25 * (target["w.weight"] - moved), rtol=1e-6, atol=1e-6)


def test_adapter_on_a_tensor_of_many_blocks(tmp_path: Path) -> None:
    """Catches rows that start in one tile and end in another."""
    rng = np.random.default_rng(0)
    base = {"w.weight": rng.normal(0, 1, (501, 333)).astype(np.float32)}
    paths = {"base": write_model(tmp_path / "base", base, dtype="F32")}
    a, b = factors(1, 501, 333)
    adapter = write_adapter(tmp_path / "adapter", w=(a, b))
    config = recipe(paths, "linear", models=[{"model": f"{paths['base']}+{adapter}", "parameters": {"weight": 1}}])
    merge(config, tmp_path / "out", threads=2)
    merged = read_all(tmp_path / "out")["w.weight"]
    np.testing.assert_allclose(merged, base["w.weight"] + 2.0 * b.astype(np.float64) @ a, rtol=1e-6, atol=1e-6)


def test_adapters_that_are_not_plain_lora_or_do_not_fit_are_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches an adapter that is applied in part."""
    good = {Q.replace(".", "__"): factors(1, 16, 16)}
    a_name = f"base_model.model.{Q}.lora_A.weight"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": {"use_dora": True}, **good}, "use_dora"),
        ({"config": {"modules_to_save": ["lm_head"]}, **good}, "modules_to_save"),
        ({"config": {"bias": "all"}, **good}, "biases"),
        ({"config": {"peft_type": "IA3"}, **good}, "no LoRA adapter"),
        ({"config": {"r": 5}, **good}, "rank and alpha"),
        ({"drop": a_name, **good}, "one half"),
        ({Q.replace(".", "__"): factors(1, 15, 16)}, "do not give its shape"),
        ({"model__layers__7__x": factors(1, 16, 16)}, "does not have"),
    ]
    for i, (options, message) in enumerate(cases):
        adapter = write_adapter(tmp_path / f"adapter{i}", **options)
        with pytest.raises((DataError, FormatError), match=message):
            merge(recipe(family, "varm", models=[{"model": f"{family['a']}+{adapter}"}]), tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        merge(recipe(family, "varm", models=[{"model": f"{family['a']}+{tmp_path / 'nowhere'}"}]), tmp_path / "out")


def test_tied_models_stay_tied(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a head that appears in, or goes missing from, a model whose head is its embedding."""
    tied = {"tie_word_embeddings": True}
    tensors = {
        name: {k: v for k, v in read_all(path).items() if k != "lm_head.weight"} for name, path in family.items()
    }
    paths = {name: write_model(tmp_path / f"t{name}", tensors[name], config=tied, dtype="F32") for name in family}
    # One target stores its head a second time.
    with_head = tensors["a"] | {"lm_head.weight": tensors["a"]["model.embed_tokens.weight"]}
    write_model(paths["a"], with_head, config=tied, dtype="F32")
    merge(recipe(paths), tmp_path / "out")
    assert "lm_head.weight" not in read_all(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    # The base stores it a second time, a target does not: both copies merge alike.
    head = {"lm_head.weight": tensors["base"]["model.embed_tokens.weight"]}
    write_model(paths["base"], tensors["base"] | head, config=tied, dtype="F32")
    merge(recipe(paths), tmp_path / "both")
    both = read_all(tmp_path / "both")
    np.testing.assert_array_equal(both["lm_head.weight"], both["model.embed_tokens.weight"])
    # An untied target has a head of its own, which a tied base cannot hold.
    write_model(paths["base"], tensors["base"], config=tied, dtype="F32")
    write_model(paths["b"], read_all(family["b"]), dtype="F32")
    with pytest.raises(DataError, match=r"lm_head\.weight.*its head is its own"):
        merge(recipe(paths), tmp_path / "bad")


def resized(tmp_path: Path, path: Path, rows: int) -> Path:
    """A copy of a model with another number of vocabulary rows; further rows hold 9."""
    tensors = {name: values.astype(np.float32) for name, values in read_all(path).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = np.full((rows, 16), 9.0, np.float32)
        grown[: min(rows, 40)] = tensors[name][:rows]
        tensors[name] = grown
    return write_model(tmp_path / f"{path.name}{rows}", tensors, config={"vocab_size": rows})


def test_vocab_base_keeps_the_bases_rows(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches rows that slip, missing rows that pull towards zero, rows that are cut without being asked for."""
    paths = family | {"a": resized(tmp_path, family["a"], 48), "b": resized(tmp_path, family["b"], 37)}
    merge(recipe(paths, "task_arithmetic", vocab="base"), tmp_path / "out")
    merged = read_all(tmp_path / "out")["model.embed_tokens.weight"]
    base, *moved = (read_all(paths[n])["model.embed_tokens.weight"].astype(np.float64) for n in ("base", "a", "b", "c"))
    assert merged.shape == (40, 16)
    b = np.vstack([moved[1], base[37:]])
    expected = base + 0.2 * (moved[0][:40] - base) + 0.5 * (b - base) + 0.4 * (moved[2] - base)
    np.testing.assert_allclose(merged, expected, rtol=1e-2, atol=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 40


def test_vocab_pad_keeps_the_longest(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches further rows that are lost, or averaged with models that do not have them."""
    paths = family | {"a": resized(tmp_path, family["a"], 48), "b": resized(tmp_path, family["b"], 44)}
    write_model(paths["b"], {k: (v * 3 if v.shape[:1] == (44,) else v) for k, v in read_all(paths["b"]).items()},
                config={"vocab_size": 44})  # fmt: skip
    merge(recipe(paths, vocab="pad"), tmp_path / "out")
    merged = read_all(tmp_path / "out")["model.embed_tokens.weight"]
    assert merged.shape == (48, 16)
    assert (merged[40:44] == 18).all()
    assert (merged[44:] == 9).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 48
    same = {name: resized(tmp_path, path, 40) for name, path in family.items()}
    write_model(same["b"], {k: (v * 3 if v.shape[:1] == (40,) else v) for k, v in read_all(same["b"]).items()})
    merge(recipe(same), tmp_path / "plain")
    np.testing.assert_array_equal(merged[:40], read_all(tmp_path / "plain")["model.embed_tokens.weight"])


def embeddings(paths: dict[str, Path]) -> dict[str, npt.NDArray[np.float64]]:
    """The embedding of every model."""
    return {name: read_all(path)[f"{EMBED}.weight"].astype(np.float64) for name, path in paths.items()}


@pytest.mark.parametrize("vocab", ["base", "pad"])
def test_rows_that_a_target_lacks_are_the_bases_for_every_method(
    family: dict[str, Path], tmp_path: Path, vocab: str
) -> None:
    """Catches missing rows that count as zero where a method sees the models themselves, not their differences."""
    paths = family | {"a": resized(tmp_path, family["a"], 39), "b": resized(tmp_path, family["b"], 37)}
    e = embeddings(paths)
    a, b = np.vstack([e["a"], e["base"][39:]]), np.vstack([e["b"], e["base"][37:]])
    merge(recipe(paths, "linear", vocab=vocab, out_dtype="float32"), tmp_path / "linear")
    merged = read_all(tmp_path / "linear")[f"{EMBED}.weight"]
    np.testing.assert_allclose(merged, (0.2 * a + 0.5 * b + 0.4 * e["c"]) / 1.1, rtol=1e-6, atol=1e-7)
    pair = {"base": paths["base"], "b": paths["b"]}
    turned = {name: np.roll(values, 3) for name, values in read_all(paths["b"]).items()}
    write_model(pair["b"], turned, config={"vocab_size": 37})
    b = np.vstack([turned[f"{EMBED}.weight"], e["base"][37:]]).astype(np.float32)
    merge(recipe(pair, "slerp", vocab=vocab, out_dtype="float32", parameters={"t": 0.3}), tmp_path / "slerp")
    merged = read_all(tmp_path / "slerp")[f"{EMBED}.weight"]
    expected = reference.slerp(e["base"].astype(np.float32).ravel(), b.ravel(), 0.3)
    np.testing.assert_allclose(merged.ravel(), expected, rtol=1e-6, atol=1e-7)
    assert min(verify(tmp_path / "linear"), verify(tmp_path / "slerp")) > 5


def test_a_flaw_in_rows_that_the_base_lends_is_the_bases(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a NaN of the base that is blamed on the target whose rows it fills, or on another row."""
    paths = family | {"b": resized(tmp_path, family["b"], 37)}
    tensors = {name: values.astype(np.float32) for name, values in read_all(family["base"]).items()}
    tensors[f"{EMBED}.weight"][39, 3] = np.nan
    write_model(family["base"], tensors)
    with pytest.raises(DataError, match=rf"of {family['base']} has 1 values.*first at \[39, 3\].*write zeros there"):
        merge(recipe(paths, "linear", vocab="base"), tmp_path / "out")
    merge(recipe(family, "linear"), tmp_path / "out")  # where no target lacks rows, linear does not read the base


def test_adapters_of_a_longer_vocabulary_count_in_every_row(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches factors whose rows do not fit the base's, and further rows without their update."""
    paths = family | {"a": resized(tmp_path, family["a"], 48)}
    a, b = factors(3, 48, 16)
    module = {EMBED.replace(".", "__"): (np.ascontiguousarray(b.T), np.ascontiguousarray(a.T))}
    adapter = write_adapter(tmp_path / "adapter", **module)
    e = embeddings(paths)
    moved = e["a"] + 2.0 * b.astype(np.float64) @ a
    models = [{"model": f"{paths['a']}+{adapter}", "parameters": {"weight": 0.25}}]
    for vocab, expected in {
        "base": e["base"] + 0.25 * (moved[:40] - e["base"]),
        "pad": np.vstack([e["base"] + 0.25 * (moved[:40] - e["base"]), moved[40:]]),
    }.items():
        config = recipe(paths, "task_arithmetic", models=models, vocab=vocab, out_dtype="float32")
        merge(config, tmp_path / f"out-{vocab}")
        merged = read_all(tmp_path / f"out-{vocab}")[f"{EMBED}.weight"]
        np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


def test_memory_counts_the_adapters_of_all_models(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an estimate that holds one adapter's factors where a tensor's merge holds those of every model."""
    adapter = write_adapter(tmp_path / "adapter", **{Q.replace(".", "__"): factors(1, 16, 16)})
    refs = [ModelRef(model=str(family[name]), adapter=str(adapter)) for name in ("base", "a", "b")]
    assert estimate.adapter_bytes([open_model(ref) for ref in refs]) == 3 * 4 * (4 * 16 + 16 * 4)
    monkeypatch.setattr(estimate, "resident_bytes", lambda: 0)
    needs = [
        merge(recipe(family, models=[str(ref) for ref in chosen]), tmp_path / "out", threads=1, dry_run=True)
        for chosen in (refs[1:], [str(family["a"]), str(family["b"])])
    ]
    assert needs[0]["memory_bytes"] - needs[1]["memory_bytes"] == 2 * 4 * (4 * 16 + 16 * 4)


def test_a_further_row_that_the_outputs_dtype_cannot_hold_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a silent infinity in rows that the base lacks."""
    paths = family | {"a": resized(tmp_path, family["a"], 48)}
    tensors = {name: values.astype(np.float32) for name, values in read_all(paths["a"]).items()}
    tensors[f"{EMBED}.weight"][47, 2] = 7e4
    write_model(paths["a"], tensors, config={"vocab_size": 48})
    with pytest.raises(DataError, match=rf"{EMBED}\.weight: 1 merged values exceed F16"):
        merge(recipe(paths, vocab="pad", out_dtype="float16"), tmp_path / "out")


def test_a_slice_of_fewer_layers_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a merge of all layers where the recipe names some of them."""
    merged = {}
    for n_layers in (1, 2):
        sources = [{"model": str(family[name]), "layer_range": [0, n_layers]} for name in ("base", "a", "b")]
        merged[n_layers] = recipe(family, slices=[{"sources": sources}], models=None)
    with pytest.raises(ConfigError, match=r"layer_range ends at 1, the models have 2 layers.*write \[0, 2\]"):
        merge(merged[1], tmp_path / "bad")
    merge(merged[2], tmp_path / "slice")
    del family["c"]
    merge(recipe(family), tmp_path / "models")
    assert (tmp_path / "slice/model.safetensors").read_bytes() == (tmp_path / "models/model.safetensors").read_bytes()


def test_what_a_model_computes_anew_is_no_weight(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a pivot saved by an old transformers (Pythia, Llama-2) whose targets, saved by a new one, are refused."""
    derived: dict[str, Any] = {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool),
        "gpt_neox.layers.0.attention.masked_bias": np.float32(-np.inf).reshape(()),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    write_model(family["base"], random_tensors(0) | derived)
    merge(recipe(family), tmp_path / "out")
    assert read_all(tmp_path / "out").keys() == read_all(family["a"]).keys()
    write_model(family["base"], random_tensors(0) | {"model.layers.0.attention.bias": np.ones(16, np.float32)})
    with pytest.raises(DataError, match=r"has no tensor model\.layers\.0\.attention\.bias"):
        merge(recipe(family), tmp_path / "bad")


def test_merged_model_loads_in_transformers(tmp_path: Path) -> None:
    """Catches names, dtypes, ties or shards that transformers cannot read; untied and tied, one file and many."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        folder = tmp_path / str(tied)
        paths = {}
        for i, name in enumerate(("base", "a", "b")):
            torch.manual_seed(i)
            config = LlamaConfig(
                vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                tie_word_embeddings=tied,
            )  # fmt: skip
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
            paths[name] = folder / name
        merge(recipe(paths, "linear"), folder / "out", max_shard_bytes=20_000)
        loaded, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True, dtype="auto")
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.dtype == torch.bfloat16
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        a, b = (AutoModelForCausalLM.from_pretrained(paths[n]).state_dict() for n in ("a", "b"))
        for name, tensor in loaded.state_dict().items():
            expected = (a[name].double() * 0.2 + b[name].double() * 0.5) / 0.7
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-2, atol=1e-4)


def test_real_models_merge(shared_data: Path, tmp_path: Path) -> None:
    """Catches what made-up models do not show: a real tied checkpoint, moved twice, merges and loads."""
    base = shared_data / "models" / "stories260K"
    tensors = read_all(base)
    rng = np.random.default_rng(0)
    facts = json.loads((base / "config.json").read_text())
    paths = {"base": base}
    for name in ("a", "b"):
        moved = {k: (v + rng.normal(0, 1e-3, v.shape)).astype(np.float32) for k, v in tensors.items()}
        paths[name] = write_model(tmp_path / name, moved, dtype="F32", config=facts)
    provenance = merge(recipe(paths), tmp_path / "out")
    assert provenance["n_tensors"] == len(tensors)
    merged = read_all(tmp_path / "out")
    for name, values in tensors.items():
        a, b = (read_all(paths[n])[name].ravel() for n in ("a", "b"))
        expected = reference.sce(values.ravel(), np.stack([a, b]), select_topk=0.3, variant="paper")
        np.testing.assert_allclose(merged[name].ravel(), expected, rtol=1e-6, atol=1e-8)


def test_random_tensors_move_around_their_base() -> None:
    """The family's targets differ from the base, else every test here would pass on a copy."""
    base = random_tensors(0)
    assert all((random_tensors(1, base)[name] != base[name]).any() for name in base if base[name].size)
