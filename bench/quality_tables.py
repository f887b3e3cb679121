"""The tables of bench/quality_align.py, one a pair of models, from what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.bench.machine import machine_name

SFT, DEFAULT = "SFT", "cells, prefix (default)"
# What is compared: the choices of fusechat.align that differ from the default.
SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    "chain": {"granularity": "chain"},
    "gold": {"granularity": "gold"},
    "first": {"granularity": "first"},
    "exact": {"vocab": "exact"},
    "mined": {"vocab": "mined"},
    "ms": {"vocab": "ms"},
    "ms-soft": {"vocab": "ms-soft"},
    "ms-upstream": {"vocab": "ms-upstream"},
    "preset: paper": {"preset": "paper"},
}


def quality_tables(results: Iterable[Path]) -> str:
    """Return the tables of several results, under the machine and the date of each."""
    parts = []
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        where = result["environment"]
        parts.append(f"### {machine_name(where)}, {where['date']}\n")
        parts += pair_tables(result["pairs"])
    return "\n".join(parts).rstrip()


def pair_tables(pairs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of one table a pair; settings that were not run are named under it."""
    for pair in pairs:
        rows = ", ".join(f"{kind} {share:.0%}" for kind, share in pair["rows"].items())
        yield f"**{pair['pivot']} ← {pair['source']}**: {rows}; {pair['dialogues_taught_by_source']:.0%} of the"
        yield f"dialogues taught by the source; {pair['steps']} steps; {pair['n_held_out']:,} pieces held out.\n"
        yield "| | bits per byte | difference to SFT | of the seeds | difference to the default |"
        yield "|---|---|---|---|---|"
        for name, line in pair["settings"].items():
            if name == SFT:
                yield f"| SFT | {line['bits_per_byte']:.3f} | | | |"
                continue
            seeds = [_signed(value) for value in sorted(line["difference_to_sft_by_seed"])]
            to_default = "" if name == DEFAULT else _difference(line["difference_to_default"])
            yield (
                f"| {name} | {line['bits_per_byte']:.3f} | {_difference(line['difference_to_sft'])} "
                f"| {seeds[0]} … {seeds[-1]} | {to_default} |"
            )
        missing = [name for name in SETTINGS if name not in pair["settings"]]
        yield f"\nNot run: {', '.join(missing)}.\n" if missing else ""


def _difference(bounds: Sequence[float]) -> str:
    value, low, high = bounds
    return f"{_signed(value)} ± {(high - low) / 2:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
