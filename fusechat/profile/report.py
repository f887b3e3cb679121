"""What `fusechat profile` prints: the summary of a stage, and the compile-time table of the kernels."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusechat.artifact import Json
from fusechat.config import load_config
from fusechat.errors import ConfigError
from fusechat.profile.native import ROOMS, Function, by_room
from fusechat.profile.piece import STAGES
from fusechat.profile.stage import (
    TORCH_STAGES,
    fresh_folder,
    ncu_command,
    profile_native,
    profile_torch,
    write_summary,
)
from fusechat.profile.summary import table

FUNCTIONS_SHOWN, FUNCTIONS_SAVED = 12, 100
STRIPPED = (
    "the engine's functions have no names, being built without symbols; from the sources:\n"
    "pip install --no-build-isolation --no-deps -e . -C cmake.build-type=RelWithDebInfo"
)


def stage_report(stage: str, config: str, overrides: list[str], out: Path, dialogues: int, console: Console) -> None:
    """Profile a stage and print what it found; raises ConfigError for a stage that there is not."""
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r} to profile: there are {', '.join(STAGES)} and kernels")
    settings = load_config(config, overrides)
    fresh_folder(out)
    facts: dict[str, object] = {"stage": stage}
    if stage in TORCH_STAGES:
        lines, facts = profile_torch(stage, settings, out, dialogues)
        ceilings = facts["ceilings"]
        assert isinstance(ceilings, dict)
        console.print(
            f"[bold]{stage}[/bold], {dialogues} dialogues on {facts['device']}: {facts['seconds']:.1f} s, tensors "
            f"{int(str(facts['peak_tensor_bytes'])) / 1e6:,.0f} MB at most",
            highlight=False,
        )
        console.print(table(lines))
        products = ", ".join(
            f"{value:,.0f} GFLOP/s in {name.removeprefix('gemm_').removesuffix('_gflop_s')}"
            for name, value in ceilings.items()
            if name.startswith("gemm_")
        )
        console.print(
            f"roofs: copy {ceilings['copy_gb_s']:,.0f} GB/s, products {products}", style="dim", highlight=False
        )
        facts["operators"] = [asdict(line) for line in lines]
    functions, done = profile_native(stage, config, overrides, out, dialogues)
    if stage not in TORCH_STAGES:
        from fusechat.bench.machine import ceilings as measured_ceilings

        facts |= done | {"ceilings": measured_ceilings()}
        console.print(what_it_did(stage, done, facts["ceilings"]["copy_gb_s"]), highlight=False)  # type: ignore[index]
    console.print(f"\n[bold]{stage}[/bold], functions of the process (perf)", highlight=False)
    if isinstance(functions, str):
        console.print(functions, style="yellow", highlight=False)
        facts["functions"] = functions
    else:
        console.print(_functions(functions))
        rooms = by_room(functions)
        console.print(_rooms(rooms))
        facts["functions"] = [asdict(function) for function in functions[:FUNCTIONS_SAVED]]
        facts["rooms"] = rooms
        if "engine" in rooms and any(f.room == "engine" and f.name.startswith("0x") for f in functions):
            console.print(STRIPPED, style="yellow", highlight=False, soft_wrap=True)
        data = shlex.quote(str(out / "perf.data"))
        console.print(
            f"callers: perf report -i {data}; one function line by line: perf annotate -i {data} NAME",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
    if stage in TORCH_STAGES:
        facts["ncu"] = ncu_command(stage, config, overrides, out, dialogues)
        console.print("\nCUDA kernels one by one, where there is a GPU:", highlight=False)
        console.print(str(facts["ncu"]), style="cyan", soft_wrap=True, highlight=False)
    write_summary(out, facts)
    console.print(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}", highlight=False)


def what_it_did(stage: str, done: Json, copy_gb_s: float) -> str:
    """Say in two lines what one call took and moved, and which share that is of copying memory."""
    moved = done["read_bytes"] + done["written_bytes"]
    gb_s = moved / done["seconds"] / 1e9
    # A copy's rate counts bytes read and bytes written, as `moved` does.
    return (
        f"[bold]{stage}[/bold]: {1e3 * done['seconds']:,.1f} ms a call, mean of {done['calls']}; "
        f"{done['amount'] / done['seconds'] / 1e6:,.3g} M {done['unit']}/s\n"
        f"{done['read_bytes'] / 1e6:,.1f} MB read, {done['written_bytes'] / 1e6:,.1f} MB written: {gb_s:.3g} GB/s, "
        f"{gb_s / copy_gb_s:.0%} of copying memory ({copy_gb_s:.1f} GB/s)"
    )


def kernels(arch: str, console: Console) -> None:
    """Compile every kernel and configuration for an architecture and print what each takes.

    Raises ConfigError when Triton is not installed, and for an architecture that is not known.
    """
    try:
        from fusechat.profile.compiled import parse_arch
        from fusechat.profile.gate import table as compile_table
    except ImportError as error:
        raise ConfigError("fusechat profile kernels needs Triton: pip install 'fusechat[triton]'") from error
    import triton

    target = parse_arch(arch)
    result = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    for header in ("kernel", "configuration"):
        result.add_column(header)
    for header in ("block", "warps", "regs", "spills", "shared", "128-bit", "occup."):
        result.add_column(header, justify="right", no_wrap=True)
    for row in compile_table(target):
        found = row.resources
        result.add_row(
            row.kernel,
            row.variant,
            str(row.block),
            str(row.warps),
            str(found.registers),
            f"[red]{found.spills}[/]" if found.spills else "0",
            f"{found.shared_bytes}",
            str(found.wide_loads),
            "–" if row.occupancy is None else f"{row.occupancy:.0%}",
        )
    console.print(f"[bold]{arch}[/bold], Triton {triton.__version__}, compiled here without a GPU", highlight=False)
    console.print(result)
    console.print(
        "registers a thread, shared memory in bytes a program, 128-bit loads in the code, warps in flight an SM",
        style="dim",
        highlight=False,
    )


def _functions(functions: list[Function]) -> Table:
    result = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    result.add_column("time", justify="right")
    result.add_column("library", max_width=22, no_wrap=True, overflow="ellipsis")
    result.add_column("function", max_width=48, no_wrap=True, overflow="ellipsis")
    for function in functions[:FUNCTIONS_SHOWN]:
        result.add_row(f"{function.share:.1%}", escape(function.library), escape(function.name))
    return result


def _rooms(shares: dict[str, float]) -> Table:
    result = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    result.add_column("time", justify="right")
    result.add_column("whose code", no_wrap=True)
    result.add_column("look at next", style="dim")
    for room, share in shares.items():
        result.add_row(f"{share:.1%}", room, ROOMS[room])
    return result
