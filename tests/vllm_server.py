"""A real `vllm serve` of a model, and a model to serve that answers every dialogue with the same rating."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

API_KEY = "sk-right"
VERDICT = "Rating: [[7]]"
_PATIENCE_S = 900  # a loaded machine is no reason for a red test


def _is_up(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
        return True
    return False


@contextlib.contextmanager
def vllm_server(model: Path, folder: Path, *options: str) -> Iterator[str]:
    """Serve `model` and yield the API's root; logs go to `folder`."""
    import vllm
    from vllm.platforms import current_platform

    # The CPU package lacks the distribution name that the command asks for.
    info = folder / "site" / f"vllm-{vllm.__version__}+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n")
    on_cpu = current_platform.is_cpu()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_cpu:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    memory = ["--kv-cache-memory-bytes", "100000000"] if on_cpu else ["--gpu-memory-utilization", "0.3"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port), *memory]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--enforce-eager", *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not _is_up(port):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline_s, f"vllm serve is not up after {_PATIENCE_S} s: see {folder / 'log'}"
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def make_judge(folder: Path, tokenizer_of: Path) -> Path:
    """Write a Llama with heads of 32 (the smallest vLLM takes on a CPU), taught in seconds to answer VERDICT.

    What is tested with it is the protocol, and that its log-probabilities are its own.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    verdict = tokenizer(VERDICT + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    header = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    for _ in range(120):
        length = int(torch.randint(4, 200, ()))
        prompts = torch.randint(3, len(tokenizer), (8, length))
        tail = torch.tensor([header + verdict]).expand(8, -1)
        input_ids = torch.cat([prompts, tail], dim=1)
        labels = input_ids.clone()
        labels[:, : -len(verdict)] = -100
        lm(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.eval().save_pretrained(folder)
    return folder
