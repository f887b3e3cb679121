"""fusechat info"""

from __future__ import annotations

from collections.abc import Callable

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
    """Return what computes each part here; of a part that could not start, why not."""
    from importlib.util import find_spec

    import torch

    from fusechat.align.backend import live_backend
    from fusechat.loss.backend import backend_for

    def merging() -> str:
        from fusechat.merge.native import _native  # noqa: F401

        return "native"

    def loss(device: str) -> str:
        return _told(lambda: backend_for(torch.device(device)), f" on {device}")

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if find_spec("triton") is None:
        kernels = "none: Triton is not installed"
    else:
        kernels = "triton" if torch.cuda.is_available() else "none: no CUDA device"
    return {
        "alignment": _told(live_backend),
        "loss": ", ".join(map(loss, devices)),
        "merge": _told(merging),
        "kernels": kernels,
    }


def _told(backend: Callable[[], str], where: str = "") -> str:
    """Return the backend of a part, or the error that its work would end with."""
    from fusechat.errors import FusechatError

    try:
        return backend() + where
    except FusechatError as error:
        return f"none{where}: {error}"
