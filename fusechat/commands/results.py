"""The table of results on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(results: dict[str, Any]) -> None:
    """Print bits per byte by group and model, then the paired differences to the control."""
    console = Console()
    groups = results["groups"]
    models = groups["overall"]["models"]
    difference = next(key for key in next(iter(models.values())) if key.startswith("difference_to_"))
    against = difference.removeprefix("difference_to_")
    console.print("[bold]held-out bits per byte[/bold], lower is better")
    console.print(_table(groups, list(models), "bits_per_byte"))
    others = [name for name in models if name != against and not name.startswith("source ")]
    console.print(f"\n[bold]difference to {against}[/bold], paired")
    console.print(_table(groups, others, difference))
    overall = groups["overall"]
    console.print(
        f"{overall['n_dialogues']} dialogues, {overall['content_bytes']:,} bytes. "
        "±: half the bootstrap interval over dialogues;\n*: it excludes 0. The JSON has the interval of every cell.",
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
            value, low, high = content["models"][name][key]
            cell = f"{value:+.3f}" if paired else f"{value:.3f}"
            if group == "overall":
                cell += f"±{(high - low) / 2:.3f}".replace("±0.", "±.")
            cells.append(cell + ("*" if paired and (low > 0 or high < 0) else " " * paired))
        table.add_row(name, *cells)
    return table
