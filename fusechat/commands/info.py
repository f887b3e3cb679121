"""fusechat info"""

from __future__ import annotations

import typer


def info() -> None:
    """Say which versions and which backends are live."""
    import importlib.metadata
    import os
    import platform

    from fusechat import __version__
    from fusechat.align.backend import live_backend

    typer.echo(f"fusechat      {__version__}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores")
    typer.echo(f"alignment     {live_backend()}")
    for package in ("torch", "transformers", "triton", "vllm", "peft", "ray"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        typer.echo(f"{package:<13} {version}")
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    typer.echo(f"CUDA devices  {', '.join(devices) or 'none'}")
