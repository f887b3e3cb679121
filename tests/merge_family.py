"""Small model directories for the tests of merging, and the comparison of a merged one with a formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.checkpoint import open_checkpoint, read_tensor

F32 = npt.NDArray[np.float32]
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (33, 16),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (33, 16),
    "model.norm.weight": (16,),
    "model.scale": (),
    "model.nothing": (0, 16),
    "lm_head.weight": (40, 16),
}
CONFIG = {"model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False, "dtype": "bfloat16"}


def bf16_bits(values: F32) -> npt.NDArray[np.uint16]:
    """Round to nearest even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_model(
    directory: Path,
    tensors: dict[str, Any],
    *,
    dtype: str | dict[str, str] = "BF16",
    shards: int = 1,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a model directory; float tensors in `dtype` (by name, if a mapping), others as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (directory / "tokenizer.json").write_text(f'{{"of": "{directory.name}"}}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "generation_config.json").write_text("{}")
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name in names[i::shards]:
            values = np.asarray(tensors[name])
            values = values.astype(np.float32) if values.dtype == np.float16 else values
            if values.dtype == np.float32:
                kind = dtype if isinstance(dtype, str) else dtype.get(name, "BF16")
                raw = bf16_bits(values) if kind == "BF16" else values.astype({"F16": "f2", "F32": "f4"}[kind])
            else:
                kind, raw = {"int64": "I64", "bool": "BOOL"}[values.dtype.name], values
            blob = raw.tobytes()
            header[name] = {
                "dtype": kind,
                "shape": list(values.shape),
                "data_offsets": [len(data), len(data) + len(blob)],
            }
            data += blob
            weight_map[name] = file
        text = json.dumps(header).encode()
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def random_tensors(seed: int, around: dict[str, F32] | None = None, scale: float = 1e-2) -> dict[str, F32]:
    """Random weights, or small moves of given ones."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(0, scale if around else 0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {name: np.asarray(values + (around[name] if around else 0), np.float32) for name, values in drawn.items()}


def make_family(tmp_path: Path) -> dict[str, Path]:
    """A base and three targets in different dtypes and shardings."""
    base = random_tensors(0)
    mixed = {"model.norm.weight": "F32", "lm_head.weight": "F16"}
    return {
        "base": write_model(tmp_path / "base", base),
        "a": write_model(tmp_path / "a", random_tensors(1, base), shards=3),
        "b": write_model(tmp_path / "b", random_tensors(2, base), dtype="F32"),
        "c": write_model(tmp_path / "c", random_tensors(3, base), dtype=mixed),
    }  # fmt: skip


def recipe(family: dict[str, Path], method: str = "sce", **changes: Any) -> dict[str, Any]:
    """A merge of everything in the family."""
    models = [{"model": str(path)} for name, path in family.items() if name != "base"]
    values: dict[str, Any] = {"merge_method": method, "base_model": str(family["base"]), "models": models}
    if method == "sce":
        values["parameters"] = {"select_topk": 0.3, "variant": "paper"}
    elif method not in ("varm", "slerp"):
        for i, model in enumerate(models):
            model["parameters"] = {"weight": [0.2, 0.5, 0.4][i % 3]}
    return values | changes


def read_all(directory: Path) -> dict[str, Any]:
    """Every tensor of a model as NumPy."""
    return {name: read_tensor(entry) for name, entry in open_checkpoint(directory).tensors.items()}


def checksums(directory: Path) -> dict[str, bytes]:
    """Everything in a directory but the provenance, which may differ in nothing else."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def expect(
    family: dict[str, Path], out: Path, formula: Callable[[str, F32, F32], npt.NDArray[np.float64]], dtype: str = "BF16"
) -> None:
    """Compare each merged tensor with a formula over flat fp32 inputs."""
    models = {name: read_all(path) for name, path in family.items()}
    merged = read_all(out)
    assert merged.keys() == SHAPES.keys()
    off, n = 0, 0
    for name, shape in SHAPES.items():
        base = models["base"][name].astype(np.float32).ravel()
        targets = np.stack([m[name].astype(np.float32).ravel() for k, m in models.items() if k != "base"])
        expected = formula(name, base, targets).astype(np.float32)
        if dtype == "BF16":
            expected = (bf16_bits(expected).astype(np.uint32) << 16).view(np.float32)
        assert merged[name].shape == shape
        found = merged[name].astype(np.float32).ravel()
        np.testing.assert_allclose(found, expected, rtol=2.0**-7 if dtype == "BF16" else 1e-6, atol=1e-7, err_msg=name)
        off += int((found != expected).sum())
        n += found.size
    assert off <= 1e-3 * n
