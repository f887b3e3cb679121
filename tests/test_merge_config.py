"""The YAML of a merge: what mergekit's users write is understood, and nothing else is let through."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.errors import ConfigError
from fusechat.merge.config import load_merge_config, parse_merge_config
from fusechat.merge.methods import METHODS
from fusechat.merge.settings import parse_setting
from fusechat.quantity import parse_size

TIES = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


SLICE = {"sources": [{"model": "a", "layer_range": [0, 8]}, {"model": "b", "layer_range": [0, 8]}]}


def base(**changes: Any) -> dict[str, Any]:
    """A small valid merge."""
    values: dict[str, Any] = {
        "merge_method": "sce",
        "base_model": "pivot",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"select_topk": 0.1},
    }
    return {k: v for k, v in (values | changes).items() if v is not None}


def test_mergekits_ties_example_is_read_as_written(tmp_path: Path) -> None:
    """Catches a base that is merged, and gradients or filters that are lost."""
    (tmp_path / "ties.yml").write_text(TIES)
    config, text = load_merge_config(tmp_path / "ties.yml")
    assert text == TIES
    assert [target.ref.model for target in config.targets] == [
        "psmathur/orca_mini_v3_13b",
        "garage-bAInd/Platypus2-13B",
        "WizardLM/WizardMath-13B-V1.0",
    ]
    assert config.out_dtype == "F16"
    values = config.values_for("model.layers.30.mlp.up_proj.weight", 10, 41)
    assert values.each("density") == pytest.approx([0.4, 0.5, 0.33])
    assert values.each("weight") == pytest.approx([1.0, 0.775, 0.5])
    assert config.values_for("lm_head.weight", 10, 41).each("weight") == pytest.approx([1.0, 0.0, 0.0])
    assert values.shared["normalize"] is True


@pytest.mark.parametrize("method", [name for name in METHODS if name != "varm"])
def test_int8_mask_is_read_and_changes_nothing(method: str) -> None:
    """Catches a recipe of mergekit's, whose methods all pass over it, that is refused for a word without effect."""
    known = {name: value for name, value in {"weight": 1, "t": 0.5}.items() if name in METHODS[method].parameters}
    changes = {"merge_method": method, "models": ["pivot", "a"]}
    found = [
        parse_merge_config(base(**changes, parameters=given), "m").values_for("x", 10, 8)
        for given in (known, known | {"int8_mask": True})
    ]
    assert METHODS[method].options(found[0]) == METHODS[method].options(found[1])


def test_one_slice_of_whole_models_is_a_merge_of_models() -> None:
    """Catches mergekit's older form, in which many SLERP recipes are written, refused or read with less."""
    own = {"model": "b", "layer_range": [0, 8], "parameters": {"weight": 0.3}}
    one = {"sources": [SLICE["sources"][0], own], "parameters": {"density": [{"filter": "mlp", "value": 0.2}]}}
    shared = {"weight": 0.7, "density": 0.6}
    config = parse_merge_config(base(merge_method="ties", models=None, slices=[one], parameters=shared), "m")
    assert config.n_layers == 8
    assert config.values_for("x.mlp.y", 10, 8).each("weight") == [0.7, 0.3]
    assert config.values_for("x.mlp.y", 10, 8).each("density") == [0.2, 0.2]
    assert config.values_for("x.attn.y", 10, 8).each("density") == [0.6, 0.6]


def test_out_dtype_wins_over_dtype() -> None:
    """Catches an output in the dtype of the arithmetic."""
    assert parse_merge_config(base(dtype="float32", out_dtype="bfloat16"), "x").out_dtype == "BF16"
    assert parse_merge_config(base(dtype="float32"), "x").out_dtype == "F32"
    assert parse_merge_config(base(), "x").out_dtype is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_metod": "sce"}, "unknown key: `merge_metod`, did you mean `merge_method`"),
        ({"merge_method": "scee"}, "'scee' is not known, did you mean `sce`"),
        ({"merge_method": None}, "merge_method is missing: say one of sce"),
        ({"merge_method": "nuslerp"}, "nuslerp of mergekit is not offered here; there are sce, varm"),
        ({"parameters": {"select_top_k": 0.1}}, "unknown parameter in parameters: `select_top_k`, did you mean"),
        ({"parameters": {"density": 0.1}}, "unknown parameter in parameters: `density`"),
        ({"parameters": {"select_topk": 1.5}}, "between 0 and 1, found 1.5"),
        ({"parameters": {"select_topk": "many"}}, "must be a number, found 'many'"),
        ({"parameters": {"select_topk": True}}, "must be a number, found True"),
        ({"parameters": {"variant": "papper"}}, "one of fuseai, paper, mergekit"),
        ({"parameters": []}, "must be a mapping"),
        ({"models": [{"model": "a", "parameters": {"select_topk": 0.1}}]}, "one value for the whole merge"),
        ({"models": [{"model": "a", "weight": 1}]}, r"unknown key in models\[0\]: `weight`"),
        ({"models": []}, "`models` must be a list"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "listed twice"),
        ({"models": [{"model": 3}]}, r"a directory or hub id, with an adapter MODEL\+ADAPTER, found 3"),
        ({"models": [{"model": "a", "adapter": 3}]}, "`adapter` must be one"),
        ({"models": [{"model": "+x"}]}, "adapter without its model"),
        ({"base_model": None}, "needs `base_model`"),
        ({"slices": []}, "give models or slices, not both"),
        ({"slices": [], "models": None}, "only one slice, of whole models"),
        ({"slices": [SLICE, SLICE], "models": None}, "only one slice, of whole models"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [4, 8]}]}], "models": None}, r"must be \[0, number"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": 8}]}], "models": None}, r"must be \[0, number"),
        ({"slices": [SLICE | {"residual_weight": 1}], "models": None}, r"key in slices\[0\]: `residual_weight`"),
        ({"tokenizer_source": "union"}, "`union` would renumber"),
        ({"tokenizer": {"source": "union"}}, "`union` would renumber"),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "not offered"),
        ({"tokenizer": {}}, "tokenizer must be a mapping with `source`"),
        ({"tokenizer": {"source": "base"}, "tokenizer_source": "base"}, "not both"),
        ({"chat_template": "chatml"}, "must be auto, a .jinja file or the template itself, found 'chatml'"),
        ({"chat_template": "absent.jinja"}, "cannot read absent.jinja"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16"),
        ({"vocab": "cut"}, "vocab must be one of error, base, pad"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"merge_method": "linear", "parameters": None}, "the parameter weight of a has no value: give it under"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "besides the base, found 2: name one of the two as base"),
        ({"merge_method": "dare_ties", "parameters": {"weight": 1, "density": 0.0}}, "density must be above 0"),
        ({"merge_method": "dare_linear", "parameters": {"weight": 1, "rescale": False}}, "is not DARE"),
        ({"merge_method": "linear", "base_model": None, "parameters": {"weight": 0}}, "sum to zero"),
        ({"merge_method": "varm", "parameters": {"granularity": ["layer", "matrix"]}}, "granularity is one value"),
        (
            {"merge_method": "varm", "parameters": {"granularity": [{"filter": "mlp", "value": "layer"}, "matrix"]}},
            "granularity is one value for the whole merge",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    """Catches keys that are silently ignored, and errors that do not say where."""
    with pytest.raises(ConfigError, match=message) as caught:
        parse_merge_config(base(**change), "merge.yml")
    assert str(caught.value).startswith("merge.yml: ")
    assert "\n" not in str(caught.value)


def test_a_key_given_twice_and_broken_yaml_are_refused(tmp_path: Path) -> None:
    """Catches the later of two keys winning silently."""
    for text, message in [
        ("merge_method: sce\nmerge_method: ties\n", "appears twice"),
        ("models: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
    ]:
        (tmp_path / "m.yml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_merge_config(tmp_path / "m.yml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_merge_config(tmp_path / "absent.yml")


def test_adapters_are_named_both_ways() -> None:
    """Catches a path that is split, or an adapter that is dropped."""
    config = parse_merge_config(base(models=["a+x/y", {"model": "b", "adapter": "z"}]), "m")
    assert [(t.ref.model, t.ref.adapter) for t in config.targets] == [("a", "x/y"), ("b", "z")]


def test_the_packages_recipes_are_valid() -> None:
    """Catches a recipe that rots."""
    recipes = sorted((Path(__file__).resolve().parents[1] / "fusechat" / "recipes").glob("merge-*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        load_merge_config(path)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.text(max_size=4))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["model", "parameters", "weight", "value", "filter"]), inner, max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


@given(
    key=st.sampled_from(["models", "parameters", "base_model", "merge_method", "tokenizer", "dtype", "vocab", "seed"]),
    value=TREES,
)
@settings(max_examples=300, deadline=None)
def test_no_yaml_ends_in_a_traceback(key: str, value: Any) -> None:
    """Catches any exception but ConfigError, whatever is put where."""
    with contextlib.suppress(ConfigError):
        parse_merge_config(base(merge_method="task_arithmetic", parameters={"weight": 1}) | {key: value}, "m")


def test_settings() -> None:
    """Catches wrong precedence and interpolation."""
    setting = parse_setting([{"filter": "mlp", "value": [0, 1, 4]}, 7], "p")
    assert setting.resolve("x.mlp.y", 0.25) == 0.5
    assert setting.resolve("x.mlp.y", 1.0) == 4
    assert setting.resolve("x.attn.y", 1.0) == 7
    assert parse_setting({"filter": "mlp", "value": 1}, "p").resolve("attn", 0) is None
    assert parse_setting("1e-3", "p").resolve("attn", 0) == 1e-3
    with pytest.raises(ConfigError, match="filter and value"):
        parse_setting([{"filters": "mlp", "value": 1}], "p")


def test_sizes() -> None:
    """Catches a factor of 1,000 and words that are no sizes."""
    assert [parse_size(s) for s in ("100MB", "1.5GiB", "4096", "2 kB", "64m")] == [
        10**8,
        1610612736,
        4096,
        2000,
        64 * 10**6,
    ]
    for text in ("", "MB", "-1", "1 parsec", "0"):
        with pytest.raises(ConfigError):
            parse_size(text)


def test_the_recipes_text_survives_a_round_trip() -> None:
    """Catches a provenance that cannot be run again."""
    config, text = load_merge_config(base())
    assert parse_merge_config(yaml.safe_load(text), "again") == config
