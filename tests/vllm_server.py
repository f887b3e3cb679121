"""A real `vllm serve` of a model, for the length of a test."""

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
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
