"""fusechat profile extract|align|train|merge CONFIG.yaml [key=value ...] [--out DIR] | kernels [--arch sm_90]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def profile(
    stage: Annotated[str, typer.Argument(help="extract, align, train, merge, or kernels", show_default=False)],
    config: Annotated[str | None, typer.Argument(help="YAML of the run, or recipe:NAME", show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="changes such as extract.batch_tokens=4096")] = None,
    out: Annotated[Path, typer.Option(help="folder of trace, memory timeline and summary")] = Path("profile"),
    dialogues: Annotated[int, typer.Option(min=1, help="how many the piece is of")] = 16,
    arch: Annotated[str, typer.Option(help="kernels: sm_80, sm_90, …, gfx942; no GPU is needed")] = "sm_90",
) -> None:
    """Profile a bounded piece of a stage, or say what the GPU kernels compile to."""
    from rich.console import Console

    from fusechat.errors import ConfigError

    console = Console()
    if stage == "kernels":
        from fusechat.profile.report import kernels

        kernels(arch, console)
        return
    if config is None:
        raise ConfigError(f"fusechat profile {stage} needs the YAML of a run: fusechat profile {stage} CONFIG.yaml")
    from fusechat.profile.report import stage_report

    stage_report(stage, config, overrides or [], out, dialogues, console)
