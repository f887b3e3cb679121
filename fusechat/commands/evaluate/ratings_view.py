"""Ratings on the terminal: groups down, models across, and what could not be rated at the foot."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fusechat.commands.results import with_interval


def print_ratings(results: dict[str, Any]) -> None:
    """Print mean ratings by group and model, the paired differences, and the counts of what is in no mean."""
    console = Console()
    groups, models = results["groups"], results["models"]
    entries = next(iter(groups.values()))["models"]
    difference = next(key for key in next(iter(entries.values())) if key.startswith("difference_to_"))
    against = difference.removeprefix("difference_to_")
    console.print("[bold]mean rating[/bold], 1 to 10")
    table = _groups_table(groups, list(models), "rating", signed=False)
    for label, key in (("judgments", "judgments"), ("without a rating", "unparsable"), ("off the scale", "off_scale")):
        table.add_row(label, *(str(models[name][key]) + " " for name in models), style="dim")
    unrated = [name for name in models if models[name]["rated"] < models[name]["judgments"]]
    if unrated:
        bounds = ["{:.2f}…{:.2f} ".format(*models[n]["if_unrated"]) if n in unrated else "" for n in models]
        table.add_row("mean, were those 1…10", *bounds, style="yellow")
    if any(models[name]["judge_sd"] is not None for name in models):
        spread = [models[name]["judge_sd"] for name in models]
        table.add_row("judge's own sd", *("–" if s is None else f"{s:.2f} " for s in spread), style="dim")
    console.print(table)
    if unrated:
        rated, of = (sum(models[name][key] for name in models) for key in ("rated", "judgments"))
        console.print(
            f"{of - rated} of {of} judgments have no rating on the scale and are in no mean; read some of them:\n"
            "does the judge follow the prompt?",
            style="yellow",
            highlight=False,
        )
    others = [name for name in models if name != against]
    if others:
        console.print(f"\n[bold]difference to {against}[/bold], paired by question", highlight=False)
        console.print(_groups_table(groups, others, difference, signed=True))
    console.print(
        f"{results['n_questions']} questions. ±: half the bootstrap interval over questions"
        + ("; *: p < 0.05,\npaired, adjusted for the number of comparisons (Holm)." if others else "."),
        highlight=False,
        style="dim",
    )


def _groups_table(groups: dict[str, Any], models: list[str], key: str, *, signed: bool) -> Table:
    table = Table(pad_edge=False, box=None, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right", overflow="fold")
    for group, content in groups.items():
        cells = [content["models"][name] for name in models]
        row = [with_interval(c[key], c["p_holm"] if signed else None, signed=signed, digits=2) for c in cells]
        table.add_row(group, *row, end_section=group in ("overall", "turn 2"))
    return table
