"""A causal language model as numbers: what its config says about parameters, memory and work.

The counts are of whole weight matrices, norms and biases, as the Hugging Face implementations have them; tests hold
them to those implementations. Everything here is arithmetic on a config and on headers: no torch, no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusechat.artifact import read_json
from fusechat.checkpoint import INDEX_FILE, SINGLE_FILE, read_weights
from fusechat.checkpoint import ITEM_BYTES as STORED_ITEM_BYTES
from fusechat.errors import DataError, FormatError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = ("*.safetensors", INDEX_FILE, "*.bin", "*.pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How an architecture differs from Llama in what it counts."""

    gated: bool = True
    """The MLP has a gate beside its up projection."""
    qkv_bias: bool = False
    bias: bool = False
    """Every projection of a layer has a bias."""
    norms: int = 2
    """Norms of the hidden width per layer."""
    norm_bias: bool = False
    qk_norm: bool = False
    """Norms of the head width on queries and keys."""
    tied: bool = False
    """Head and embedding are one matrix where the config does not say."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "internlm2": Family(),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, tied=True),
    "gpt_neox": Family(gated=False, bias=True, norm_bias=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only transformer. `dtype` is what its forward pass computes in by itself, `quantisation`
    the method of its weights."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocab: int
    tied: bool
    context_tokens: int
    experts: int = 1
    experts_per_token: int = 1
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"
    quantisation: str | None = None
    stored_dtype: str = ""
    """The dtype of most stored weights, where their headers were read."""
    weight_bytes: int | None = None
    """Size of the stored weights, where their headers were read."""
    remote_code: bool = False
    """Whether only Python of its own can build it: transformers has no such architecture."""

    @property
    def in_file(self) -> str:
        """The dtype the weights are stored in, as far as is known."""
        return self.stored_dtype or self.dtype

    @property
    def known(self) -> bool:
        """Whether the architecture's norms and biases are known; else it is counted like a Llama."""
        return self.family in FAMILIES

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its up projection."""
        return FAMILIES.get(self.family, Family()).gated

    @property
    def mlp_widths_kept(self) -> int:
        """How many intermediate widths a token's MLP keeps for the backward pass: what goes in and out of its products
        and of its activation function."""
        return 4 if self.gated else 2


def shape_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape a config.json describes; raises DataError naming the key that it lacks."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert text is not None
    family_name = str(text.get("model_type") or config.get("model_type") or "")
    family = FAMILIES.get(family_name, Family())

    def size(*keys: str, default: int | None = None) -> int:
        key, value = next(((key, text[key]) for key in keys if text.get(key) is not None), (keys[0], default))
        if value is None:
            raise DataError(f"the config of {name} has no {keys[0]}: it is not a decoder-only language model's")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"the config of {name} says {key}: {value!r}, which must be a whole number above 0")
        return value

    def part(key: str, of: str, whole: int, *, default: int) -> int:
        value = size(key, default=default)
        if value > whole:
            raise DataError(f"the config of {name} says {key}: {value}, of {whole} {of}")
        return value

    hidden = size("hidden_size", "n_embd", "d_model")
    heads = size("num_attention_heads", "n_head")
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=1)
    quantisation = config.get("quantization_config")
    return ModelShape(
        name=name,
        family=family_name,
        hidden=hidden,
        layers=size("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=part("num_key_value_heads", "heads", heads, default=heads),
        head_width=size("head_dim", default=max(1, hidden // heads)),
        intermediate=size("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", family.tied))),
        context_tokens=size("max_position_embeddings", "n_positions", default=2048),
        experts=experts,
        experts_per_token=part("num_experts_per_tok", "experts", experts, default=1),
        attention_bias=bool(text.get("attention_bias", False)) or family.bias,
        mlp_bias=bool(text.get("mlp_bias", False)) or family.bias,
        dtype=computed_dtype(config, {}),
        quantisation=str(quantisation.get("quant_method", "quantised")) if isinstance(quantisation, dict) else None,
        remote_code=needs_remote_code(config),
    )


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json names Python of its own for an architecture that transformers does not have."""
    if not config.get("auto_map"):
        return False
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES  # configuration_auto loads torch

    return config.get("model_type") not in CONFIG_MAPPING_NAMES


def computed_dtype(config: Mapping[str, Any], elements: Mapping[str, int]) -> str:
    """Return what a forward pass computes in by itself, for extraction and plan alike: what config.json states, else
    the dtype of most stored floats, else float32.

    `elements` counts the stored numbers by safetensors' dtypes.
    """
    return stated_dtype(config) or _most(elements) or "float32"


def stated_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that a config.json states; empty where it states none that a forward pass computes in."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    named = [str(part.get(key)).removeprefix("torch.") for part in parts for key in ("dtype", "torch_dtype")]
    return next((dtype for dtype in named if dtype in _FLOATS.values()), "")


def _most(elements: Mapping[str, int]) -> str:
    floats = {_FLOATS[dtype]: n for dtype, n in elements.items() if dtype in _FLOATS}
    return max(floats, key=lambda dtype: floats[dtype], default="")


def shape_of_directory(directory: Path) -> tuple[ModelShape, int | None]:
    """Return the shape of a model directory and how many numbers its weights are, None where it has none.

    Raises DataError for a directory that is no model's, FormatError for a header that contradicts its file.
    """
    if not (directory / "config.json").exists():
        raise DataError(f"{directory} has no config.json: it is not a model directory")
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{directory / 'config.json'} is not a JSON object")
    shape = shape_from_config(directory.name, config)
    if not any(any(directory.glob(pattern)) for pattern in _WEIGHTS):  # of a served source: they are the server's
        return shape, None
    elements = stored_elements(directory)
    return with_weights(shape, config, elements), sum(elements.values())


def stored_elements(directory: Path) -> dict[str, int]:
    """Return how many numbers of every safetensors dtype a model directory holds, by the headers."""
    elements: dict[str, int] = {}
    for entry in read_weights(directory, SINGLE_FILE, INDEX_FILE).values():
        elements[entry.dtype] = elements.get(entry.dtype, 0) + entry.n_elements
    return elements


def with_weights(shape: ModelShape, config: Mapping[str, Any], elements: Mapping[str, int]) -> ModelShape:
    """Return a config's shape with what the headers say of the weights: `elements` by safetensors' dtypes."""
    size_bytes = sum(n * STORED_ITEM_BYTES.get(dtype, 1) for dtype, n in elements.items())
    return replace(
        shape, dtype=computed_dtype(config, elements), stored_dtype=_most(elements), weight_bytes=size_bytes
    )  # fmt: skip


def expert_parameters(shape: ModelShape) -> int:
    """Return the parameters of one MLP."""
    gated = _family(shape).gated
    weights = (3 if gated else 2) * shape.hidden * shape.intermediate
    return weights + shape.mlp_bias * (shape.intermediate * (2 if gated else 1) + shape.hidden)


def attention_parameters(shape: ModelShape) -> int:
    """Return the parameters of one layer's attention."""
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    weights = shape.hidden * (2 * query + 2 * key)
    biases = query + 2 * key if shape.attention_bias or _family(shape).qkv_bias else 0
    return weights + biases + shape.hidden * shape.attention_bias + 2 * shape.head_width * _family(shape).qk_norm


def layer_parameters(shape: ModelShape) -> int:
    """Return the parameters of one decoder layer."""
    router = shape.hidden * shape.experts if shape.experts > 1 else 0
    norms = _family(shape).norms * shape.hidden * (1 + _family(shape).norm_bias)
    return attention_parameters(shape) + shape.experts * expert_parameters(shape) + router + norms


def embedding_parameters(shape: ModelShape) -> int:
    """Return the parameters of the input embedding, which are also the head's."""
    return shape.vocab * shape.hidden


def count_parameters(shape: ModelShape) -> int:
    """Return all parameters; a tied head counts once."""
    final_norm = shape.hidden * (1 + _family(shape).norm_bias)
    ends = embedding_parameters(shape) * (1 if shape.tied else 2)
    return shape.layers * layer_parameters(shape) + final_norm + ends


def active_parameters(shape: ModelShape) -> int:
    """Return the parameters of the layers that one token passes: of a mixture's experts only those chosen."""
    idle = (shape.experts - shape.experts_per_token) * expert_parameters(shape)
    return shape.layers * (layer_parameters(shape) - idle)


def stored_bytes(shape: ModelShape, dtype: str | None = None) -> int:
    """Return the size of the weights: as stored, or as they would be in `dtype`.

    Embedding and head stay 2 bytes wide in a quantised model.
    """
    if dtype is None and shape.weight_bytes is not None:
        return shape.weight_bytes
    dtype = dtype or shape.in_file
    n = count_parameters(shape)
    if dtype in ("fp8", "int8", "int4"):
        wide = embedding_parameters(shape) * (1 if shape.tied else 2)
        return int((n - wide) * ITEM_BYTES[dtype] + wide * 2)
    return int(n * ITEM_BYTES.get(dtype, 2))


def kv_bytes_per_token(shape: ModelShape, item_bytes: int = 2) -> int:
    """Return what one token keeps in the attention's cache."""
    return 2 * shape.layers * shape.kv_heads * shape.head_width * item_bytes


def forward_flops(shape: ModelShape, tokens: float, context_tokens: float, head_rows: float) -> float:
    """Return the floating-point operations of a forward pass: 2 per weight and token, attention over half of the
    context on average (`context_tokens` is a sequence's length), and the head on `head_rows` positions."""
    attention = 2 * 2 * shape.layers * shape.heads * shape.head_width * context_tokens / 2
    return tokens * (2 * active_parameters(shape) + attention) + head_rows * 2 * embedding_parameters(shape)


def training_flops(
    shape: ModelShape, tokens: float, context_tokens: float, head_rows: float, *, frozen: bool = False
) -> float:
    """Return the operations of forward and backward, without what gradient checkpointing repeats: the backward pass
    costs two forwards, or one where the weights are `frozen` (LoRA) and need no gradient of their own."""
    return forward_flops(shape, tokens, context_tokens, head_rows) * (2 if frozen else 3)


def _family(shape: ModelShape) -> Family:
    return FAMILIES.get(shape.family, Family())
