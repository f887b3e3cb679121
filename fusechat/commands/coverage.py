"""What became of rows and probability in an alignment, on the terminal."""

from __future__ import annotations

from fusechat.artifact import Json

MARKS = {"same": "=", "coarser": "<", "finer": ">", "none": "."}
WORST_TOKENS = 6
EXAMPLE_TOKENS = 16


def print_coverage(report: Json) -> None:
    """Print a coverage report: rows by kind with the fate of their mass, the worst tokens, and one example."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, title="coverage", title_justify="left")
    for column in ("kind", "rows", "share", "mass: exact", "approximate", "lost"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, count in report["n_rows"].items():
        mass = report["mass_by_kind"].get(kind)
        fates = [f"{mass[fate]:.2%}" for fate in ("exact", "approximate", "lost")] if mass else ["–"] * 3
        table.add_row(f"{MARKS[kind]} {kind}", f"{count:,}", f"{report['rows'][kind]:.1%}", *fates)
    console.print(table)
    worst = report["lost_tokens"][:WORST_TOKENS]
    if worst:
        named = "  ".join(f"{token['bytes']!r} {token['share']:.0%}" for token in worst)
        console.print(f"lost most  {named}", markup=False)
    for example in report["examples"][:1]:
        pivot, kinds = example["pivot"][:EXAMPLE_TOKENS], example["kinds"]
        end = pivot[-1]["to"] if pivot else 0
        source = [token for token in example["source"][:EXAMPLE_TOKENS] if token["from"] < end]
        console.print("source  ", " ".join(repr(token["text"]) for token in source), markup=False)
        marked = (f"{token['text']!r}{MARKS[kind]}" for token, kind in zip(pivot, kinds))
        console.print("pivot   ", " ".join(marked), markup=False)
