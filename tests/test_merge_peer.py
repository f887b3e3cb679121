"""mergekit itself on the same files, in a virtual environment of its own.

python -m venv .venv-mergekit && .venv-mergekit/bin/pip install mergekit==0.1.5, or FUSECHAT_MERGEKIT=its mergekit-yaml.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from merge_family import read_all, write_model

from fusechat.checkpoint import open_checkpoint
from fusechat.merge import merge

pytestmark = pytest.mark.peer
HIDDEN, VOCAB, INTER = 64, 500, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": INTER, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.fixture(scope="module")
def mergekit() -> Path:
    """The peer's command."""
    default = Path(__file__).resolve().parents[1] / ".venv-mergekit" / "bin" / "mergekit-yaml"
    command = Path(os.environ.get("FUSECHAT_MERGEKIT", default))
    if not command.exists():
        pytest.skip("mergekit is not here: see the head of this file")
    return command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small Llama and four fine-tunes of it, without ties: mergekit's choice among those is torch's."""
    folder = tmp_path_factory.mktemp("peer")
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (INTER, HIDDEN) for p in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (HIDDEN, INTER)}
        shapes |= {f"{layer}{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    base = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    paths = {"base": write_model(folder / "base", base, dtype="F32", config=CONFIG)}
    for name in "abcd":
        scale = {"a": 1e-2, "b": 3e-3, "c": 1e-3, "d": 2e-2}[name]
        moved = {k: (v + rng.normal(0, scale, v.shape)).astype(np.float32) for k, v in base.items()}
        paths[name] = write_model(folder / name, moved, dtype="F32", config=CONFIG)
    for path in paths.values():
        (path / "tokenizer.json").unlink()  # not a real one
    return paths


def recipe(models: dict[str, Path], method: str, n_targets: int = 4) -> dict[str, Any]:
    """A merge both tools read."""
    targets: list[dict[str, Any]] = [{"model": str(models[name])} for name in "abcd"[:n_targets]]
    return {
        "merge_method": method, "base_model": str(models["base"]), "models": targets, "dtype": "float32",
        "out_dtype": "bfloat16",
    }  # fmt: skip


def weighted(models: dict[str, Path], method: str, **parameters: Any) -> dict[str, Any]:
    """The same with weights, and further parameters, for each model."""
    config = recipe(models, method)
    for i, target in enumerate(config["models"]):
        target["parameters"] = {"weight": [0.4, 0.3, -0.2, 0.6][i], **parameters}
    return config


def in_one_slice(config: dict[str, Any]) -> dict[str, Any]:
    """The same in mergekit's older form, which wants the base among the sources."""
    models = [{"model": config["base_model"]}, *config["models"]]
    sources = [model | {"layer_range": [0, 2]} for model in models]
    return {key: value for key, value in config.items() if key != "models"} | {"slices": [{"sources": sources}]}


SLERP_T = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.4}]
CASES: dict[str, Any] = {
    "sce 0.1": lambda m: recipe(m, "sce") | {"parameters": {"select_topk": 0.1}},
    "sce 0.5": lambda m: recipe(m, "sce") | {"parameters": {"select_topk": 0.5}},
    "sce 1.0": lambda m: recipe(m, "sce"),
    "linear": lambda m: {k: v for k, v in weighted(m, "linear").items() if k != "base_model"},
    "task_arithmetic": lambda m: weighted(m, "task_arithmetic") | {"parameters": {"lambda": 0.8}},
    "ties": lambda m: weighted(m, "ties", density=0.6),
    "ties, not normalised": lambda m: weighted(m, "ties", density=0.3) | {"parameters": {"normalize": False}},
    "dare_ties, density 1": lambda m: weighted(m, "dare_ties", density=1.0),
    "dare_linear, density 1": lambda m: weighted(m, "dare_linear") | {"parameters": {"normalize": True}},
    "slerp": lambda m: recipe(m, "slerp", 1) | {"parameters": {"t": SLERP_T}},
    "slerp, in one slice": lambda m: in_one_slice(recipe(m, "slerp", 1)) | {"parameters": {"t": SLERP_T}},
    "filters": lambda m: weighted(m, "ties", density=[{"filter": "q_proj", "value": 0.2}, {"value": [0.5, 1.0]}]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_model_as_mergekit(mergekit: Path, models: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Catches any reading of a shared method that is not mergekit's, at dtype float32 and out_dtype bfloat16."""
    config = CASES[case](models)
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(config))
    subprocess.run(
        [str(mergekit), str(tmp_path / "theirs.yml"), str(tmp_path / "theirs"), "--no-copy-tokenizer"],
        check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if case.startswith("sce"):
        config["parameters"] = {**config.get("parameters", {}), "variant": "mergekit"}
    merge(config, tmp_path / "ours")
    ours, theirs = read_all(tmp_path / "ours"), read_all(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert {e.dtype for e in open_checkpoint(tmp_path / "ours").tensors.values()} == {"BF16"}
    differ = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    n = sum(values.size for values in ours.values())
    for name, values in ours.items():
        ulps = np.abs(_ordered(values) - _ordered(theirs[name]))
        # Where base and update cancel, a unit of the result is less than fp32's rounding of what was added.
        cancelled = np.abs(values - theirs[name]) <= 2.0**-23 * np.abs(read_all(models["base"])[name])
        assert (ulps[~cancelled] <= 1).all(), f"{name}: {ulps[~cancelled].max()} units in the last place"
    assert differ <= 1e-4 * n, f"{differ} of {n} elements differ"


def _ordered(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The place of each bf16 number among all of them."""
    bits = (values.view(np.uint32) >> 16).astype(np.int64)
    return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)


def test_config_is_the_bases(models: dict[str, Path], tmp_path: Path) -> None:
    """Our output states the dtype it holds."""
    merge(recipe(models, "sce"), tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts.get("dtype") == "bfloat16"
