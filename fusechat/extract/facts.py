"""What a model's own files say before anything of it is loaded: vocabulary, context, dtype, quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.artifact import read_json
from fusechat.config import ExtractConfig
from fusechat.errors import DataError, first_line
from fusechat.model_shape import computed_dtype, needs_remote_code, stated_dtype, stored_elements


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Rows of the embedding (token ids are smaller), the length to cut at, and what the forward pass computes in."""

    vocab_size: int
    max_length_tokens: int
    dtype: str
    quantization: str | None


def model_facts(directory: Path, config: ExtractConfig) -> ModelFacts:
    """Read a model directory's facts; raises DataError when it is no model's, or needs code that is not trusted."""
    from transformers import AutoConfig

    from fusechat.model import context_tokens  # torch: importing this package must not load it

    if not (directory / "config.json").exists():
        raise DataError(f"{directory} has no config.json: it is not a model directory")
    try:
        own: Any = AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not config.trust_remote_code and needs_remote_code(read_json(directory / "config.json")):
            raise DataError(
                f"{directory} is of an architecture that transformers does not have and brings Python of its own: "
                "extract.trust_remote_code: true runs that code with all your rights, so read it first"
            ) from error
        raise DataError(f"{directory / 'config.json'} cannot be used: {first_line(error)}") from error
    text = own.get_text_config()
    quantized = getattr(own, "quantization_config", None)
    if quantized is not None and not isinstance(quantized, dict):
        quantized = quantized.to_dict()
    return ModelFacts(
        vocab_size=int(text.vocab_size),
        # A server takes prompts one token shorter than its model's context.
        max_length_tokens=context_tokens(own, config.max_length_tokens, reserve=config.backend == "vllm-server"),
        dtype=_dtype(directory, config),
        quantization=config.quantization or (str(quantized.get("quant_method")) if quantized else None),
    )


def _dtype(directory: Path, config: ExtractConfig) -> str:
    """The asked dtype, else the checkpoint's: vLLM's own `auto` would take float16 for a float32 checkpoint."""
    if config.dtype != "auto":
        return config.dtype
    own = read_json(directory / "config.json")
    if config.backend == "vllm-server":  # the weights are elsewhere
        return stated_dtype(own) or "auto"
    return computed_dtype(own, stored_elements(directory))
