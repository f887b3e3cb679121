"""A plan on the terminal, within 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusechat.plan import Plan
from fusechat.plan.stage import StagePlan
from fusechat.quantity import duration, human_bytes, prefixed


def print_plan(plan: Plan, console: Console) -> None:
    """Print the stages, how they are to be run, what to change, and what was assumed."""
    hardware = plan.hardware
    what = (
        f"this computer, {human_bytes(hardware.memory_bytes)}"
        if hardware.on_cpu
        else f"{hardware.devices} × {escape(hardware.name)}, {human_bytes(hardware.memory_bytes)} each"
    )
    console.print(f"[bold]plan[/bold] on {what}", highlight=False)
    console.print(_stages(plan))
    total = sum(stage.seconds for stage in plan.stages)
    left = "" if plan.disk_limit_bytes is None else f" of {human_bytes(plan.disk_limit_bytes)}"
    console.print(
        f"together {duration(total)}, {human_bytes(plan.disk_bytes)}{left} on the disk", highlight=False, style="bold"
    )
    if any("tensor_parallel_size" in stage.settings for stage in plan.stages):
        console.print()
        console.print(_engines(plan))
    if plan.strategies:
        cells = [
            f"{name} [{'green' if size <= hardware.memory_bytes else 'red'}]{human_bytes(size)}[/]"
            for name, size in plan.strategies.items()
        ]
        console.print(f"\ntraining, a GPU: {', '.join(cells)}", highlight=False)
        train = next(stage for stage in plan.stages if stage.stage == "train").settings
        console.print(f"planned with {train['strategy']}, launched by", highlight=False)
        launch = (
            str(train["launch"]).replace(" --config_file", " \\\n    --config_file").replace(".yaml ", ".yaml \\\n    ")
        )
        console.print(f"  {launch} CONFIG", highlight=False)
    alike: dict[tuple[str, str], list[str]] = {}
    for stage in plan.stages:
        if not stage.fits:
            advice = f"{stage.refused or _too_much(stage)}. Mend: {'; or '.join(stage.changes) or 'more memory'}"
            alike.setdefault((stage.stage, advice), []).append(stage.name)
    changes = [f"{what} {', '.join(names)}: {advice}" for (what, advice), names in alike.items()]
    if not plan.disk_fits:
        changes.append(f"the disk is too small by {human_bytes(plan.disk_bytes - (plan.disk_limit_bytes or 0))}")
    for change in changes:
        console.print(f"\n[red]![/red] {escape(change)}", highlight=False)
    console.print("\nassumed: " + escape("; ".join(plan.assumptions)), style="dim", highlight=False)


def _too_much(stage: StagePlan) -> str:
    device, host = stage.device_bytes - stage.device_limit_bytes, stage.host_bytes - stage.host_limit_bytes
    return f"{human_bytes(device)} too much a GPU" if device > 0 else f"{human_bytes(host)} too much on the host"


def _engines(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("extract", no_wrap=True, max_width=14, overflow="ellipsis")
    table.add_column("backend")
    keys = ("tensor_parallel_size", "engines", "max_num_batched_tokens")
    for key in keys:
        table.add_column(key, justify="right")
    for stage in plan.stages:
        if stage.stage == "extract":
            values = (str(stage.settings.get(key, "–")) for key in keys)
            table.add_row(escape(stage.name), str(stage.settings["backend"]), *values)
    return table


def _stages(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    for header in ("stage", "of"):
        table.add_column(header, no_wrap=True, max_width=14, overflow="ellipsis")
    for header in ("params", "GPUs", "GPU", "host", "disk", "FLOPs", "time", ""):
        table.add_column(header, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            escape(stage.name),
            prefixed(stage.parameters, giga="B"),
            str(stage.devices or "–"),
            human_bytes(stage.device_bytes) if stage.devices else "–",
            human_bytes(stage.host_bytes),
            human_bytes(stage.disk_bytes) if stage.disk_bytes else "–",
            prefixed(stage.flops) if stage.flops else "–",
            duration(stage.seconds),
            "[green]fits[/]" if stage.fits else "[red]no[/]",
        )
    return table
