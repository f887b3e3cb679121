"""Llama-shaped models of any size for the merge's benchmark: bf16, a quarter of each update exactly zero."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 22
Shapes = dict[str, tuple[int, ...]]


def llama_shapes(hidden: int, layers: int, vocab: int, inter: int, *, tied: bool) -> Shapes:
    """Return the tensors of a Llama without grouped heads."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (inter, hidden) for p in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (hidden, inter)}
        shapes |= {f"{layer}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,)}
    return shapes if tied else shapes | {"lm_head.weight": (vocab, hidden)}


def llama_config(hidden: int, layers: int, vocab: int, inter: int, *, tied: bool) -> dict[str, Any]:
    """Return a config both tools accept."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-6,
    }  # fmt: skip


def write_family(folder: Path, shapes: Shapes, config: dict[str, Any], n_targets: int) -> list[Path]:
    """Write a base and targets, tensor by tensor, unless they are there; returns their directories, the base first."""
    models = [folder / name for name in ("base", *(f"target{j}" for j in range(n_targets)))]
    if (folder / "complete").exists():
        return models
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    files = []
    for model in models:
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(config))
        files.append((model / "model.safetensors").open("wb"))
        files[-1].write(len(text).to_bytes(8, "little") + text)
    rng = np.random.default_rng(0)
    for shape in shapes.values():
        n = math.prod(shape)
        for begin in range(0, n, BLOCK):
            base = _bf16(rng.standard_normal(min(BLOCK, n - begin), dtype=np.float32) * np.float32(0.02))
            files[0].write(base.tobytes())
            exact = (base.astype(np.uint32) << 16).view(np.float32)
            for j, file in enumerate(files[1:]):
                move = rng.standard_normal(base.size, dtype=np.float32) * np.float32(10 ** (-3 + j / 4))
                move[rng.random(base.size, dtype=np.float32) < 0.25] = 0
                file.write(_bf16(exact + move).tobytes())
    for file in files:
        file.close()
    (folder / "complete").touch()
    return models


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
