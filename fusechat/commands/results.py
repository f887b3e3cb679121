"""The table of results on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(results: dict[str, Any]) -> None:
    """Print bits per byte by group and model, with intervals, and the paired difference to the control."""
    console = Console()
    groups = results["groups"]
    names = list(groups["overall"]["models"])
    key = next(key for key in groups["overall"]["models"][names[0]] if key.startswith("difference_to_"))
    against = key.removeprefix("difference_to_")
    table = Table(title="held-out bits per byte, lower is better", title_justify="left", pad_edge=False, box=None)
    table.add_column("model", no_wrap=True)
    for group in groups:
        table.add_column(group, justify="right")
    table.add_column("±", justify="right")
    table.add_column(f"− {against}, paired", justify="right", no_wrap=True)
    for name in names:
        cells = [f"{group['models'][name]['bits_per_byte'][0]:.3f}" for group in groups.values()]
        _, low, high = groups["overall"]["models"][name]["bits_per_byte"]
        value, least, most = groups["overall"]["models"][name][key]
        paired = "" if name == against else f"{value:+.3f} [{least:+.3f}, {most:+.3f}]"
        table.add_row(name, *cells, f"{(high - low) / 2:.3f}", paired)
    console.print(table, highlight=False)
    overall = groups["overall"]
    console.print(
        f"{overall['n_dialogues']} dialogues, {overall['content_bytes']:,} bytes; ± and brackets: bootstrap",
        highlight=False,
        style="dim",
    )
