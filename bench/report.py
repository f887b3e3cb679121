"""What every benchmark script does at its end: a table within 80 columns, JSON with the machine, an exit code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusechat.bench.claims import Claim
from fusechat.bench.machine import ceilings, disk_ceilings, environment, machine_name
from fusechat.errors import ConfigError

CEILINGS = {
    "copy_gb_s": "GB/s copy",
    "gemm_float32_gflop_s": "GFLOP/s fp32 product",
    "gemm_bfloat16_gflop_s": "GFLOP/s bf16 product",
    "disk_write_mb_s": "MB/s written and synced",
    "disk_warm_read_mb_s": "MB/s read warm",
}
MARKS = {
    "reached": "[green]reached[/]",
    "short": "[red]short[/]",
    "measured": "",
    "not measured": "[dim]not measured[/]",
}


def parser(
    description: str, *, devices: Sequence[str] = ("cpu",), presets: Sequence[str] | None = ("small", "paper")
) -> argparse.ArgumentParser:
    """Return the options every benchmark has; --against is read by those that have peers.

    `devices` are those it can measure, the default first; `presets` what --size may be, None where the caller checks.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", metavar="OUT", type=Path, help="write claims and environment there")
    options.add_argument("--check", action="store_true", help="exit 1 when a claim falls short")
    options.add_argument("--device", choices=devices, default=devices[0])
    named = "" if presets else ", or NAME=VALUE,…"
    options.add_argument(
        "--size", choices=presets, default="paper", help=f"small, paper (what the claims are about){named}"
    )
    options.add_argument(
        "--against",
        metavar="PEER[=PYTHON]",
        action="append",
        default=[],
        help="a peer package, importable here or in the virtual environment of that Python; repeatable",
    )
    return options


def sizes(text: str, small: Mapping[str, int], paper: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes that --size names: a preset, or `paper` with some values changed.

    Raises ConfigError for a name that this benchmark does not have and for a value that is no positive number.
    """
    if text in ("small", "paper"):
        return dict(small if text == "small" else paper)
    found = dict(paper)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in found:
            raise ConfigError(f"--size {text}: no size {name!r}; there are small, paper, or {', '.join(found)}=VALUE")
        if not value.isdecimal() or int(value) == 0:
            raise ConfigError(f"--size {text}: {name} wants a positive whole number, not {value!r}")
        found[name] = int(value)
    return found


def report(benchmark: str, claims: list[Claim], options: argparse.Namespace, *, disk: bool = False) -> int:
    """Measure the ceilings, print the table, write the JSON if asked; return 1 if --check is on and a claim short.

    `disk` adds what a file costs to write and to read.
    """
    measured = any(claim.value is not None for claim in claims)
    result = result_of(benchmark, claims, options.device)
    if measured:
        result["ceilings"] = ceilings(options.device) | (disk_ceilings() if disk else {})
    print_table(result, Console())
    if options.json:
        write_json(result, options.json)
    return int(options.check and any(claim.holds is False for claim in claims))


def result_of(benchmark: str, claims: Sequence[Claim], device: str) -> dict[str, Any]:
    """Return claims as the JSON has them, with the machine, its ceilings not measured."""
    return {
        "environment": environment(device),
        "ceilings": {},
        "claims": [{"benchmark": benchmark, **asdict(claim), "verdict": claim.verdict} for claim in claims],
    }


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write what a benchmark found."""
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print one row a claim, and under it what it cost and which share of the measured ceiling that is."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = f"{machine_name(result['environment'])}, {result['environment']['date']}"
    table.add_column("claim")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("to reach", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for claim in result["claims"]:
        details = "; ".join(part for part in (cost_of(claim, result.get("ceilings", {})), claim["note"]) if part)
        what = claim["name"] + (
            f" [dim]against[/] {claim['against']}" if claim["against"] not in ("", "absolute") else ""
        )
        table.add_row(
            what + (f"\n[dim]{details}[/]" if details else ""),
            value_of(claim),
            claim["to_reach"],
            MARKS[claim["verdict"]],
        )
    console.print(table)
    found = result.get("ceilings", {})
    if found:
        figures = (f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in found.values())
        console.print(f"[dim]ceilings: {', '.join(f'{f} {CEILINGS[k]}' for f, k in zip(figures, found))}[/]")


def value_of(claim: Mapping[str, Any]) -> str:
    """Return the figure with its quartiles."""
    if claim["value"] is None:
        return "–"
    text = (
        f"{claim['value']:.3g} {claim['unit']}"
        if abs(claim["value"]) < 1000
        else f"{claim['value']:,.0f} {claim['unit']}"
    )
    if claim.get("low") is None:
        return text
    return f"{text}\n[dim]{claim['low']:.3g}–{claim['high']:.3g}[/]"


def cost_of(claim: Mapping[str, Any], found: Mapping[str, float]) -> str:
    """Return time, memory and the shares of the copy and product ceilings, as far as they are known."""
    parts = []
    if claim.get("cpu_s") is not None:
        parts.append(f"{1e3 * claim['cpu_s']:.3g} CPU-ms, {1e3 * claim['wall_s']:.3g} ms wall")
    if claim.get("peak_mib") is not None:
        parts.append(f"{claim['peak_mib']:.0f} MiB at its peak")
    work = claim.get("work")
    if work:
        gb_s = work["n_bytes"] / work["seconds"] / 1e9
        share = f", {gb_s / found['copy_gb_s']:.0%} of copy" if found else ""
        parts.append(f"{gb_s:.3g} GB/s{share}")
        if work["n_flops"]:
            gflop_s = work["n_flops"] / work["seconds"] / 1e9
            dtype = work["dtype"]
            share = f", {gflop_s / found[f'gemm_{dtype}_gflop_s']:.0%} of the {dtype} product" if found else ""
            parts.append(f"{gflop_s:.3g} GFLOP/s{share}")
    return ", ".join(parts)
