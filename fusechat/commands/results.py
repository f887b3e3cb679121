"""The table of results on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(results: dict[str, Any]) -> None:
    """Print bits per byte by group and model with their intervals, then the paired differences to the control."""
    console = Console()
    groups = results["groups"]
    models = groups["overall"]["models"]
    difference = next(key for key in next(iter(models.values())) if key.startswith("difference_to_"))
    against = difference.removeprefix("difference_to_")
    console.print(_table("held-out bits per byte, lower is better", groups, list(models), "bits_per_byte"))
    others = [name for name in models if name != against]
    console.print()
    console.print(_table(f"difference to {against}, paired", groups, others, difference, sign="+"))
    overall = groups["overall"]
    console.print(
        f"{overall['n_dialogues']} dialogues, {overall['content_bytes']:,} bytes; "
        "±: half a bootstrap interval over dialogues",
        highlight=False,
        style="dim",
    )


def _table(title: str, groups: dict[str, Any], models: list[str], key: str, sign: str = "") -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False, box=None, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for group in groups:
        table.add_column(group, justify="right", no_wrap=True)
    for name in models:
        cells = []
        for group in groups.values():
            value, low, high = group["models"][name][key]
            cells.append(f"{value:{sign}.3f}" + f"±{(high - low) / 2:.3f}".replace("±0.", "±."))
        table.add_row(name, *cells)
    return table
