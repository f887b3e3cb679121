"""fusechat bench NAME... [--device] [--size] [--against] [--json] [--compare] [--check] [--plot]"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fusechat.commands.json_out import STDOUT, JsonOut, tell


class Device(StrEnum):
    """Where to measure."""

    cpu = "cpu"
    cuda = "cuda"


def bench(
    names: Annotated[
        list[str], typer.Argument(help="align, extract, linear-loss, loss, merge, plan, store, train; all")
    ],
    device: Annotated[Device, typer.Option(help="where to measure")] = Device.cpu,
    size: Annotated[str, typer.Option(help="small (seconds), paper (what is claimed), or NAME=VALUE,…")] = "paper",
    against: Annotated[
        list[str] | None, typer.Option(help="PEER or PEER=PYTHON, a virtual environment that has it; repeatable")
    ] = None,
    json_out: JsonOut = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="an older result, or a folder of one for each instruction set; exit 1 if worse"),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="how much worse --compare allows; 0.3 is 30 %")] = 0.3,
    check: Annotated[bool, typer.Option(help="exit 1 when a claim falls short")] = False,
    plot: Annotated[Path | None, typer.Option(help="write the roofline there, as .png and .svg")] = None,
) -> None:
    """Measure throughput and memory: equality first, then interleaved pairs, against peers and ceilings."""
    from fusechat.bench.compare import read_old, worse
    from fusechat.bench.machine import instruction_set
    from fusechat.bench.roofline import plot_roofline
    from fusechat.bench.suite import run_benchmarks

    old = None if compare is None else read_old(compare, instruction_set())
    result = run_benchmarks(names, device.value, size, against or [], tables=json_out != STDOUT)
    tell(result, json_out, lambda _: None)  # each benchmark has printed its table
    if plot is not None:
        for path in plot_roofline(result, plot):
            typer.echo(f"wrote {path}")
    failed = check and any(claim["holds"] is False for claim in result["claims"])
    if old is not None:
        lines, compared = worse(old, result, tolerance)
        for line in lines:
            typer.echo(line, err=True)
        typer.echo(
            f"{compared} claims compared with {compare}, {len(lines)} worse by more than {tolerance:.0%}", err=True
        )
        failed = failed or bool(lines) or compared == 0
    raise typer.Exit(int(failed))
