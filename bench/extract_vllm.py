"""vLLM's driver side on the benchmark's model, as JSON on the last line; bench/extract.py runs it where vLLM is.

    python -m fusechat.bench.extract_vllm MODEL COUNT ROUNDS

The engine's core runs in this process and on this thread, so that what is not the engine can be told from what is: the
driver is everything `score_prompts` does outside the core's steps.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np

from fusechat.bench.extract_model import MAX_TOKENS, load, n_tokens, sequences
from fusechat.extract.fast_driver import kept_tensors
from fusechat.extract.flat_lists import extended_lists
from fusechat.extract.hf import score_rows
from fusechat.extract.vllm import flat_arrays, score_prompts, tensor_arrays
from fusechat.records import Encoded


class Stopwatch:
    """CPU-seconds spent in the engine's core."""

    def __init__(self, engine: Any) -> None:
        self.seconds = 0.0
        core = engine.llm_engine.engine_core
        step = core.get_output

        def timed() -> Any:
            start = time.process_time()
            try:
                return step()
            finally:
                self.seconds += time.process_time() - start

        core.get_output = timed


def dict_arrays(output: Any, width: int) -> tuple[Any, Any]:
    """Turn dict log-probabilities into arrays entry by entry, as one would write it first."""
    ids = np.zeros((len(output) - 1, width), dtype=np.int32)
    logprobs = np.full(ids.shape, -np.inf, dtype=np.float32)
    for row, entry in enumerate(output[1:]):
        for column, (token, value) in enumerate(entry.items()):
            ids[row, column] = token
            logprobs[row, column] = value.logprob
    return ids, logprobs


def main(model: str, count: int, rounds: int) -> None:
    """Measure and print."""
    import torch
    import vllm

    torch.set_num_threads(1)
    some = sequences(count)
    engine = vllm.LLM(
        model=model, dtype="float32", max_model_len=MAX_TOKENS + 1, max_logprobs=64, max_num_batched_tokens=8192,
        enable_prefix_caching=False, enforce_eager=True, kv_cache_memory_bytes=1 << 29, disable_log_stats=True,
    )  # fmt: skip
    watch = Stopwatch(engine)

    def sampling(k: int, **options: Any) -> Any:
        return vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, **options)

    def ours(k: int, to_arrays: Callable[[Any, int], Any]) -> list[Any]:
        options = sampling(k, flat_logprobs=True, detokenize=False)
        return score_prompts(engine, options, some, to_arrays, lambda tokens: None)

    def plain(k: int) -> None:
        prompts = [{"prompt_token_ids": member.input_ids.tolist()} for member in some]
        for output in engine.generate(prompts, sampling(k), use_tqdm=False):
            dict_arrays(output.prompt_logprobs, k + 1)

    def measured(call: Callable[[], Any]) -> tuple[float, float]:
        watch.seconds = 0.0
        start = time.process_time()
        call()
        return time.process_time() - start - watch.seconds, watch.seconds

    with extended_lists():
        found: dict[str, float] = _agreement(ours(10, flat_arrays), Path(model), some)
    ways: dict[str, tuple[Callable[[], AbstractContextManager[object]], Callable[[], Any]]] = {
        "flat-10": (extended_lists, lambda: ours(10, flat_arrays)),
        "plain-10": (nullcontext, lambda: plain(10)),
        "flat-64": (extended_lists, lambda: ours(64, flat_arrays)),
        "fast-10": (kept_tensors, lambda: ours(10, tensor_arrays)),
        "fast-64": (kept_tensors, lambda: ours(64, tensor_arrays)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (patched, call) in ways.items():
            with patched():
                times[name].append(measured(call))
    per_token = 1e6 / n_tokens(some)
    for name in ("flat-10", "flat-64", "fast-10", "fast-64"):
        found[name] = per_token * statistics.median(driver for driver, _ in times[name])
    found["engine-10"] = per_token * statistics.median(core for _, core in times["flat-10"])
    pairs = zip(times["plain-10"], times["flat-10"], strict=True)
    found["plain-over-ours"] = statistics.median(sum(a) / sum(b) for a, b in pairs)
    print(json.dumps(found))


def _agreement(scores: list[Any], directory: Path, some: list[Encoded]) -> dict[str, float]:
    """Compare with the hf backend: the share of ids in order, and the largest difference of a gold log-probability."""
    expected = score_rows(load(directory), some, top_k=10, batch_tokens=8192)
    same = np.mean(np.concatenate([(a.ids == b.ids).ravel() for a, b in zip(scores, expected)]))
    apart = max(float(np.abs(a.gold_logprob - b.gold_logprob).max()) for a, b in zip(scores, expected))
    assert same >= 0.999, same
    assert apart <= 1e-4, apart
    return {"ids": float(same), "apart": apart}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
