"""What a process of a stage holds before it has met a model: the interpreter and the libraries, started once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fusechat.errors import FusechatError

GPU_PROCESS_BYTES = 3_000_000_000
"""Host memory of a process that drives a GPU, assumed: libraries, and the CUDA context's share of it."""

# One step on a model of no size loads what a stage loads at its first: modelling code, BLAS, kernels, tokenizers.
_EMPTY_MODEL = """
import torch, jinja2, tokenizers
import fusechat.bytetable, fusechat.encode, fusechat.template
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
mask = torch.ones(2, 8, dtype=torch.int64); mask[1, 4:] = 0
out = model(input_ids=torch.ones(2, 8, dtype=torch.int64), attention_mask=mask, use_cache=False).logits
"""
# Prefix cells are numba's, whose compiler weighs more than all else that alignment loads.
_CELLS = """
import numpy as np
import fusechat.align.stage
from fusechat.align.cells_kernel import fill
def of(dtype, *shape): return np.zeros(shape, dtype)
fill(of("i4", 1), of("f8", 1), of("i8", 1), of("i8", 1), of("u2", 1, 1), of("f8", 1, 1), of("i4", 1), of("f8", 1),
    of("i4", 1, 1), of("i4", 1, 1), of("i4", 1, 1),
    (of("u2", 1, 3), of("f8", 1, 3), of("i4", 1, 3), of("i4", 1, 3)))
"""
_CODE = {
    "extract": "import fusechat.extract" + _EMPTY_MODEL,
    "train": "import fusechat.train, fusechat.train.trainer, fusechat.loss" + _EMPTY_MODEL + "out.sum().backward()\n"
    "torch.optim.AdamW(model.parameters()).step()\n",
    "merge": "import fusechat.merge\n",
    "align": "import fusechat.align.stage\n",
    "align cells": _CELLS,
}
_PEAK = "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])"


def process_bytes(stages: Sequence[str]) -> dict[str, int]:
    """Return the peak resident memory of an empty process of each stage, in bytes, measured in children;
    `align cells` is alignment with `granularity: cells`.

    Raises FusechatError when a stage's libraries do not import.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(stages, pool.map(_measure, stages)))


def _measure(stage: str) -> int:
    done = subprocess.run([sys.executable, "-c", _CODE[stage] + _PEAK], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FusechatError(f"{stage} cannot start here: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return int(done.stdout.split()[-1]) * 1024
