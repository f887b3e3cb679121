"""A merge's numbers as text."""

from __future__ import annotations

from pathlib import Path

from fusechat.artifact import Json, read_json
from fusechat.merge.output import STATISTICS
from fusechat.quantity import human_bytes


def needs(estimate: Json, out: Path) -> str:
    """Say in a few lines what a dry run found."""
    return "\n".join(
        [
            f"tensors   {estimate['n_tensors']} ({estimate['n_elements']:,} elements)",
            f"read      {human_bytes(estimate['input_bytes'])}",
            f"disk      {human_bytes(estimate['output_bytes'])} in {estimate['n_shards']} files under {out}",
            f"memory    {human_bytes(estimate['memory_bytes'])} with {estimate['threads']} threads",
            f"time      {estimate['seconds']:.1f} s when the files are in memory (measured on one tensor)",
        ]
    )


def tensor_table(out: Path) -> str:
    """Return one line per tensor: weights, selected elements, threshold, sign conflicts, norm of the update."""
    rows = [("tensor", "weights", "k", "threshold", "conflicts", "update norm")]
    for name, stats in read_json(out / STATISTICS).items():
        rows.append(
            (
                name,
                " ".join(f"{weight:.3f}" for weight in stats.get("weights", [])),
                _cell(stats.get("k"), "d"),
                _cell(stats.get("threshold"), ".3g"),
                _cell(stats.get("sign_conflict_rate"), ".1%"),
                _cell(stats.get("update_norm"), ".4g"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _cell(value: object, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join("-" if item is None else format(item, form) for item in value)
    return format(value, form)
