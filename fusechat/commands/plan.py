"""fusechat plan CONFIG.yaml|recipe:NAME [key=value ...] [--hardware] [--gpus] [--gpu-memory] [--disk] [--json]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusechat.commands.json_out import JsonOut, tell


def plan(
    config: Annotated[str, typer.Argument(help="YAML of the run, or recipe:NAME", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes such as train.epochs=2")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="h200, h100-80, a100-80, a100-40, rtx4090, cpu, or a file of facts; when absent, the GPUs here, "
            "else the CPU"
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many; the hardware's own number when absent")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="of one GPU, such as 40GB; enough without --hardware")] = None,
    disk: Annotated[str | None, typer.Option(help="room, such as 2TB; what is free under `out` when absent")] = None,
    dialogues: Annotated[int | None, typer.Option(min=1, help="how many, for data that is not a local file")] = None,
    tokens_per_dialogue: Annotated[int | None, typer.Option(min=1, help="on average, for the same")] = None,
    json_out: JsonOut = None,
) -> None:
    """Say what a fusion will need, stage by stage: memory, disk, FLOPs, time, and what to change. Reads no weights."""
    import shutil

    from rich.console import Console

    from fusechat.artifact import nearest_there
    from fusechat.config import load_config
    from fusechat.plan import plan as make_plan
    from fusechat.plan.hardware import load_hardware
    from fusechat.plan.report import print_plan
    from fusechat.quantity import parse_size
    from fusechat.recipe import is_recipe

    settings = load_config(config, overrides or [])
    machine = load_hardware(
        hardware, gpus=gpus, memory_bytes=None if gpu_memory is None else parse_size(gpu_memory)
    )  # fmt: skip
    place = nearest_there(Path.cwd() if is_recipe(config) else Path(settings.out))
    result = make_plan(
        settings,
        machine,
        dialogues=dialogues,
        tokens_per_dialogue=tokens_per_dialogue,
        disk_limit_bytes=shutil.disk_usage(place).free if disk is None else parse_size(disk),
    )
    tell(result.as_json(), json_out, lambda _: print_plan(result, Console()))
