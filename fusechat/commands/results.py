"""The table of results on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SIGNIFICANT = 0.05


def with_interval(triple: Sequence[float], p: float | None = None, *, signed: bool = False, digits: int = 3) -> str:
    """Return value ± half the interval's width, and a star when p < 0.05; "–" where there is no value."""
    value, low, high = triple
    if math.isnan(value):
        return "– "
    half = f"{(high - low) / 2:.{digits}f}".removeprefix("0")
    return f"{value:{'+' if signed else ''}.{digits}f}±{half}" + star(p)


def star(p: float | None) -> str:
    """Return the mark of a significant difference, or a space of its width."""
    return "*" if p is not None and p < SIGNIFICANT else " "


def print_results(results: dict[str, Any]) -> None:
    """Print bits per byte by group and model, then the paired differences to the control."""
    console = Console()
    groups = results["groups"]
    models = groups["overall"]["models"]
    difference = next(key for key in next(iter(models.values())) if key.startswith("difference_to_"))
    against = difference.removeprefix("difference_to_")
    console.print("[bold]held-out bits per byte[/bold], lower is better")
    console.print(_table(groups, list(models), "bits_per_byte"), markup=False)
    others = [name for name in models if name != against and not name.startswith("source ")]
    if others:
        console.print(f"\n[bold]difference to {escape(against)}[/bold], paired")
        console.print(_table(groups, others, difference), markup=False)
    for name, why in results.get("not_scored", {}).items():
        console.print(f"{name} is not scored: {why}", highlight=False, markup=False)
    overall = groups["overall"]
    excluded = f" ({results['excluded_dialogues']} more do not fit)" if results["excluded_dialogues"] else ""
    console.print(
        f"{overall['n_dialogues']} dialogues{excluded}, {overall['content_bytes']:,} bytes. "
        "±: half the bootstrap interval over dialogues;\n*: p < 0.05, paired, adjusted for the number of comparisons "
        "(Holm).\nThe JSON has every interval and p.",
        highlight=False,
        style="dim",
    )


def _table(groups: dict[str, Any], models: list[str], key: str) -> Table:
    paired = key.startswith("difference_to_")
    table = Table(pad_edge=False, box=None, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for group in groups:
        table.add_column(group, justify="right", no_wrap=True)
    for name in models:
        cells = []
        for group, content in groups.items():
            entry = content["models"][name]
            p = entry["p_holm"] if paired else None
            if group == "overall":
                cells.append(with_interval(entry[key], p, signed=paired))
            else:
                cells.append(f"{entry[key][0]:{'+' if paired else ''}.3f}" + star(p))
        table.add_row(name, *cells)
    return table
