"""The table of a sweep on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_sweep(sweep: dict[str, Any]) -> None:
    """Print every merge of a sweep from the best on, with the paired difference to it."""
    console = Console()
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("merge", overflow="fold")
    for heading in ("bits per byte", "to the best", "survives"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, merge in sorted(sweep["merges"].items(), key=lambda item: item[1]["bits_per_byte"][0]):
        value, low, high = merge["bits_per_byte"]
        gain, least, most = merge["difference_to_best"]
        shares = merge["surviving_share"]
        table.add_row(
            f"[bold]{name}[/bold]" if name == sweep["best"] else name,
            f"{value:.3f} ± {(high - low) / 2:.3f}",
            "best" if name == sweep["best"] else f"{gain:+.3f} ± {(most - least) / 2:.3f}",
            "-" if shares is None else f"{min(shares):.0%}",
        )
    console.print(table, highlight=False)
    console.print(
        f"{sweep['n_dialogues']} validation dialogues; ±: half the bootstrap interval, differences paired;\n"
        "survives: the least share of a target's update (of its sum of squares) that reached the merge.",
        highlight=False,
        style="dim",
    )
