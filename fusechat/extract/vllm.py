"""The vLLM backend, in this process: prompt log-probabilities of the token ids that are sent.

Settings and their reasons: docs/extraction.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.artifact import Json
from fusechat.errors import ConfigError, DataError, FusechatError
from fusechat.extract.budget import gpu_memory_utilization, step_tokens
from fusechat.extract.fast_driver import kept_tensors
from fusechat.extract.flat_lists import extended_lists
from fusechat.extract.scores import Advance, RowScores, Scorer, rows_of_prompt
from fusechat.extract.task import Task
from fusechat.records import Encoded

# vLLM holds every answer of a call until the last is there; a K = 10 entry is 1 kB of Python a token.
_MACRO_BATCH_DIALOGUES = 256
_CPU_KV_CACHE_BYTES = 1 << 30

_MISSING = "backend: vllm cannot be imported ({}): pip install 'fusechat[vllm]', or use backend: hf"

_Prompt = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


@contextmanager
def open_vllm(task: Task) -> Iterator[Scorer]:
    """Start vLLM on the task's model; raises ConfigError when it is absent or refuses its arguments."""
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(_MISSING.format(error)) from error
    sampling = vllm.SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=task.config.top_k, flat_logprobs=True, detokenize=False
    )
    to_arrays = tensor_arrays if task.config.fast_driver else flat_arrays
    # A context as long as the model's own still needs max_model_len one longer; no token is computed at that place.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    vllm.envs.disable_envs_cache()  # an engine that this process had before has frozen what the environment says
    with kept_tensors() if task.config.fast_driver else extended_lists():
        engine = _engine(vllm, task)
        yield Scorer(
            score=lambda encoded, _, advance: score_prompts(engine, sampling, encoded, to_arrays, advance),
            engine=_facts(vllm, engine, task),
        )


def require_vllm() -> None:
    """Raise ConfigError when vLLM is not installed; loads nothing of it."""
    if find_spec("vllm") is None:
        raise ConfigError(_MISSING.format("it is not installed"))


def engine_arguments(task: Task, *, on_cpu: bool, memory_bytes: int) -> Json:
    """Return the arguments of vLLM's LLM class; `extract.engine_args` overrides those that are no keys."""
    config = task.config
    arguments: Json = {
        "model": str(task.directory),
        "skip_tokenizer_init": True,
        "dtype": task.dtype,
        "quantization": config.quantization,
        "tensor_parallel_size": config.tensor_parallel_size or 1,
        "trust_remote_code": config.trust_remote_code,
        "max_model_len": task.max_length_tokens + 1,  # a prompt of exactly max_model_len is refused
        "max_logprobs": config.top_k,
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": False,
        "gpu_memory_utilization": gpu_memory_utilization(config),
        "max_num_batched_tokens": step_tokens(
            config, task.vocab_size, memory_bytes, dtype_bytes=4 if task.dtype == "float32" else 2
        ),
        "disable_log_stats": True,
    }
    if on_cpu:
        # The utilisation would be of the host's memory, and a compiled model does not pay for its minutes.
        arguments |= {"kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES, "enforce_eager": True}
    return arguments | config.engine_args


def _engine(vllm: Any, task: Task) -> Any:
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    arguments = engine_arguments(task, on_cpu=on_cpu, memory_bytes=int(current_platform.get_device_total_memory()))
    try:
        return vllm.LLM(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"vLLM {vllm.__version__} refuses {task.model}: {' '.join(str(error).split())[:500]}"
        ) from error
    except RuntimeError as error:
        raise FusechatError(
            f"vLLM {vllm.__version__} did not start on {task.model}: {' '.join(str(error).split())[:300]}; its log "
            "says why. Out of memory? Lower extract.engine_args.gpu_memory_utilization or max_num_batched_tokens"
        ) from error


def _facts(vllm: Any, engine: Any, task: Task) -> Json:
    model = engine.llm_engine.vllm_config.model_config
    return {
        "name": "vllm",
        "version": vllm.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization and str(model.quantization),
        "tensor_parallel_size": task.config.tensor_parallel_size or 1,
    }


def score_prompts(
    engine: Any,
    sampling: Any,
    encoded: Sequence[Encoded],
    to_arrays: Callable[[Any, int], _Prompt],
    advance: Advance,
) -> list[RowScores]:
    """Return every sequence's rows, asking the engine for a macro-batch of sequences at a time."""
    scores: list[RowScores] = []
    width = sampling.prompt_logprobs + 1
    for begin in range(0, len(encoded), _MACRO_BATCH_DIALOGUES):
        members = encoded[begin : begin + _MACRO_BATCH_DIALOGUES]
        prompts = [{"prompt_token_ids": member.input_ids.tolist()} for member in members]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        for member, output in zip(members, outputs, strict=True):
            scores.append(rows_of_prompt(*to_arrays(output.prompt_logprobs, width), member))
            output.prompt_logprobs = None
        advance(sum(len(member.input_ids) for member in members))
    return scores


def flat_arrays(prompt_logprobs: Any, width: int) -> _Prompt:
    """Turn a sequence's FlatLogprobs into ids int32[T−1, K+1] and logprobs float32[T−1, K+1].

    Its first entry, of the token that nothing predicts, is empty. Raises DataError for another layout.
    """
    ids, logprobs = prompt_logprobs.token_ids, prompt_logprobs.logprobs
    n = len(prompt_logprobs.start_indices) - 1
    if len(ids) != n * width or len(logprobs) != n * width:
        raise DataError(f"vLLM gave {len(ids)} prompt log-probabilities for {n} tokens, expected {width} each")
    return (
        np.fromiter(ids, dtype=np.int32, count=len(ids)).reshape(n, width),
        np.fromiter(logprobs, dtype=np.float32, count=len(logprobs)).reshape(n, width),
    )


def tensor_arrays(prompt_logprobs: Any, width: int) -> _Prompt:
    """Turn what `kept_tensors` kept into ids int32[T−1, K+1] and logprobs float32[T−1, K+1]."""
    ids = np.concatenate(prompt_logprobs.ids)
    logprobs = np.concatenate(prompt_logprobs.logprobs)
    if ids.shape[1:] != (width,) or logprobs.shape != ids.shape:
        raise DataError(f"vLLM gave prompt log-probabilities of shape {ids.shape}, expected [T-1, {width}]")
    return ids.astype(np.int32, copy=False), logprobs.astype(np.float32, copy=False)
