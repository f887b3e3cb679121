"""fusechat info"""

from __future__ import annotations

import typer


def info() -> None:
    """Say which versions and which backends are live."""
    import importlib.metadata
    import os
    import platform

    from fusechat import __version__

    typer.echo(f"fusechat      {__version__}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores")
    for part, live in _backends().items():
        typer.echo(f"{part:<13} {live}")
    for package in ("torch", "transformers", "triton", "vllm", "peft", "ray"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        typer.echo(f"{package:<13} {version}")
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    typer.echo(f"CUDA devices  {', '.join(devices) or 'none'}")


def _backends() -> dict[str, str]:
    """Return what computes each part here."""
    from importlib.util import find_spec

    import torch

    from fusechat.align.backend import live_backend
    from fusechat.errors import NativeMissingError
    from fusechat.loss.backend import backend_for

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    try:
        from fusechat.merge.native import _native  # noqa: F401

        merging = "native"
    except NativeMissingError as error:
        merging = f"none: {error}"
    if find_spec("triton") is None:
        kernels = "none: Triton is not installed"
    else:
        kernels = "triton" if torch.cuda.is_available() else "none: no CUDA device"
    return {
        "alignment": live_backend(),
        "loss": ", ".join(f"{backend_for(torch.device(device))} on {device}" for device in devices),
        "merge": merging,
        "kernels": kernels,
    }
