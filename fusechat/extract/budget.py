"""How many tokens vLLM may prefill in one step without running out of memory over their log-probabilities.

Its V1 runner computes, for the tokens of a step, the logits in the model's dtype and a float32 log-softmax of all of
them, and its memory profiling does not count either (8,192 tokens at V = 152,064 are 7.5 GB). The V2 runner works in
chunks of 1,024 rows; what suits V1 suits it too.
"""

from __future__ import annotations

from fusechat.config import ExtractConfig
from fusechat.errors import ConfigError

# Enough to fill a GPU with a 7B model (docs/extraction.md); more would only take memory.
MAX_BATCHED_TOKENS = 8192
MIN_BATCHED_TOKENS = 64
GPU_MEMORY_UTILIZATION = 0.85
# Of what is left beside vLLM's own share, CUDA's context and the allocator's gaps want some.
_USABLE = 0.8


def prompt_logprob_bytes(n_tokens: int, vocab_size: int, *, dtype_bytes: int = 2) -> int:
    """Return what the log-probabilities of a step take while they are computed: logits, and float32 log-softmax."""
    return n_tokens * vocab_size * (dtype_bytes + 4)


def gpu_memory_utilization(config: ExtractConfig) -> float:
    """Return the share of a GPU's memory that vLLM takes: `extract.engine_args` may say it.

    Raises ConfigError for what is no share.
    """
    share = config.engine_args.get("gpu_memory_utilization", GPU_MEMORY_UTILIZATION)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(
            f"extract.engine_args.gpu_memory_utilization is {share!r}: it must be a number above 0, and at most 1"
        )
    return float(share)


def step_tokens(config: ExtractConfig, vocab_size: int, memory_bytes: int, *, dtype_bytes: int) -> int:
    """Return vLLM's `max_num_batched_tokens`: what `extract.engine_args` says, else `max_batched_tokens`.

    Raises ConfigError for what is no number of tokens.
    """
    tokens = config.engine_args.get("max_num_batched_tokens")
    if tokens is None:
        share = gpu_memory_utilization(config)
        return max_batched_tokens(vocab_size, memory_bytes, dtype_bytes=dtype_bytes, utilization=share)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(
            f"extract.engine_args.max_num_batched_tokens is {tokens!r}: it must be a whole number above 0"
        )
    return tokens


def max_batched_tokens(
    vocab_size: int,
    memory_bytes: int,
    *,
    dtype_bytes: int = 2,
    utilization: float = GPU_MEMORY_UTILIZATION,
) -> int:
    """Return how many tokens a step may have for a vocabulary and a device's memory.

    The log-probabilities must fit into 80 % of the share of the memory that `gpu_memory_utilization` leaves to others;
    between 64 and 8,192 tokens, a power of two. With tensor parallelism every device gathers the whole vocabulary's
    logits, so it does not help.
    """
    free_bytes = (1.0 - utilization) * memory_bytes * _USABLE
    fit = int(free_bytes) // prompt_logprob_bytes(1, vocab_size, dtype_bytes=dtype_bytes)
    fit = max(MIN_BATCHED_TOKENS, min(MAX_BATCHED_TOKENS, fit))
    return 1 << (fit.bit_length() - 1)
