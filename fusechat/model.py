"""A causal language model as this project uses it: hidden states, and a head applied to chosen rows.

The head is never applied to a whole batch: `[B,S,V]` is the largest tensor a plain forward pass builds, and nearly all
of it would be thrown away.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusechat.errors import ConfigError, DataError, FormatError, first_line, nearest

log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """logits = softcap·tanh((hidden·weightᵀ + bias) / softcap), the parts absent where the model has none."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits float32[R,V] of a few hidden states [R,D]."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a directory's causal language model in evaluation mode; raises DataError or FormatError in one line, and
    ConfigError for an unknown dtype.

    `device: auto` is a CUDA device where there is one, else the CPU. `device_map` is accelerate's placement over
    several devices instead; the head's weights must then be on one of them, not offloaded. `trust_remote_code` runs
    Python that lies in the directory.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known{nearest(dtype, _DTYPES)}")
    disable_progress_bar()  # loading has no business between our own bars
    if not (directory / "config.json").exists():
        raise DataError(f"{directory} has no config.json: it is not a model directory")
    if not any(directory.glob("*.safetensors")):
        raise DataError(
            f"{directory} has no safetensors weights: convert them once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            device_map=device_map,
        )
    except SafetensorError as error:
        raise FormatError(f"the weights of {directory} are truncated or foreign: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise DataError(f"{directory} does not load as a causal language model: {first_line(error)}") from error
    if device_map is not None:
        if head(model).weight.is_meta:
            raise DataError(f"device_map {device_map} offloads the head of {directory}: give it more memory")
        return model.eval()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise DataError(f"{directory} does not go to device {device}: {first_line(error)}") from error


def unwrapped(model: Any) -> Any:
    """Return the model itself, out of its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return what the head is applied to, [B,S,D], for input_ids and attention_mask int64[B,S].

    A constant factor that the architecture puts on its logits (Cohere, Granite) is on the hidden states already.
    """
    inner = unwrapped(model)
    outputs = inner.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return scaled_hidden(inner, outputs.last_hidden_state)


def scaled_hidden(inner: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states times the constant factor that the architecture puts on its logits."""
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return hidden if scale == 1.0 else hidden * scale


def head(model: Any) -> Head:
    """Return the model's head, with the softcap its configuration declares."""
    inner = unwrapped(model)
    layer = inner.get_output_embeddings()
    return Head(weight=layer.weight, bias=getattr(layer, "bias", None), softcap=head_softcap(inner))


def head_softcap(inner: Any) -> float | None:
    """Return the softcap of the logits that the configuration declares, None without one."""
    softcap: float | None = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    return softcap


def embedding_rows(model: Any) -> int:
    """Return the number of rows of the input embedding: token ids must be smaller."""
    return int(model.get_input_embeddings().weight.shape[0])


def context_tokens(config: Any, asked_tokens: int, *, reserve: int = 0) -> int:
    """Return the smaller of the asked length and the model's own context, less `reserve`, saying so when that is it."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is not None and own - reserve < asked_tokens:
        log.info("context: %d tokens (the model's own), %d were asked for", own - reserve, asked_tokens)
        return int(own) - reserve
    return asked_tokens


@torch.no_grad()
def check_head(model: Any, token_ids: npt.NDArray[np.int32]) -> None:
    """Compare head(hidden_states(ids)) with the model's own logits on the first tokens of one sequence, int32[T].

    Raises DataError when they differ: the architecture does something to its logits that this project does not know.
    """
    input_ids = torch.from_numpy(token_ids[:32].astype(np.int64))[None].to(model.device)
    own = model(input_ids=input_ids, use_cache=False).logits[0].float()
    hidden = hidden_states(model, input_ids, torch.ones_like(input_ids))[0]
    logits = head(model).logits(hidden)
    tolerance = 1e-3 if own.dtype == hidden.dtype else 5e-2
    atol = tolerance * (1.0 + own.nan_to_num().abs().max().item())
    if not torch.allclose(logits, own, rtol=tolerance, atol=atol, equal_nan=True):
        name = type(model).__name__
        raise DataError(
            f"{name} changes its logits in a way this version does not know: extract it with another backend"
        )
