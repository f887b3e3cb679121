"""A patch of vLLM that keeps prompt log-probabilities as the tensors they arrive as.

vLLM turns every entry into Python numbers, in the process that also feeds the GPU. This replaces one private method,
after comparing its signature and its neighbours with those it was written for (vLLM 0.32).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fusechat.errors import ConfigError


class KeptTensors:
    """The prompt log-probabilities of one request: NumPy arrays [tokens of a chunk, K+1], in order."""

    __slots__ = ("ids", "logprobs")

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.logprobs: list[Any] = []

    def __len__(self) -> int:
        return len(self.ids)


def _update_prompt_logprobs(self: Any, prompt_logprobs_tensors: Any) -> None:
    if not isinstance(self.prompt_logprobs, KeptTensors):
        self.prompt_logprobs = KeptTensors()
    ids, logprobs, *_ = prompt_logprobs_tensors
    self.prompt_logprobs.ids.append(np.asarray(ids))
    self.prompt_logprobs.logprobs.append(np.asarray(logprobs))


@contextmanager
def kept_tensors() -> Iterator[None]:
    """Replace the method for as long as the block lasts.

    Raises ConfigError when this vLLM is not built the way the patch expects.
    """
    processor = _processor()
    original = processor._update_prompt_logprobs
    processor._update_prompt_logprobs = _update_prompt_logprobs
    try:
        yield
    finally:
        processor._update_prompt_logprobs = original


def _processor() -> Any:
    try:
        from vllm.v1.engine.logprobs import LogprobsProcessor
        from vllm.v1.outputs import LogprobsTensors

        found = list(inspect.signature(LogprobsProcessor._update_prompt_logprobs).parameters)
        fields = list(LogprobsTensors._fields)[:2]
        fits = found == ["self", "prompt_logprobs_tensors"] and "prompt_logprobs" in LogprobsProcessor.__annotations__
        fits = fits and fields == ["logprob_token_ids", "logprobs"]
    except (ImportError, AttributeError, ValueError):
        fits = False
    if not fits:
        raise ConfigError("fast_driver does not know this version of vLLM: set extract.fast_driver: false")
    return LogprobsProcessor
