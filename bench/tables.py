"""The tables of README, docs/performance.md and docs/alignment.md from bench/results/*.json; a test finds stale ones.

    python bench/tables.py

A table holds the figures of one machine; results of other machines get tables of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.bench.machine import machine_name
from fusechat.bench.quality_tables import quality_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- {name}: written by `make readme-table` -->", "<!-- end of {name} -->"
Claim = Mapping[str, Any]

# One line a stage: what it is called there, and the claim that says it (benchmark, name, against).
HEADLINES = [
    ("align: warping as in the paper", "align", "dtw, one pair, 2048 tokens", "plain Python"),
    ("loss on K sparse targets", "loss", "sparse_soft_ce, float32", "gather and autograd"),
    ("loss, collation included", "loss", "collate and loss, B=4 S=512", "dense targets, as the research code"),
    ("loss with lm_head", "linear-loss", "linear_sparse_soft_ce, float32", "its three bare products"),
    ("training, several dialogues a row", "train", "packed tokens a second", "padded"),
    ("merge: SCE, τ = 0.1, 0.47B", "merge", "sce 0.1", "mergekit 0.1.5"),
    ("merge: SCE, 152k × 1,024 embedding", "merge", "sce 0.1, wide embedding", "mergekit 0.1.5"),
    ("merge: linear, 0.12B", "merge", "linear", "mergekit 0.1.5"),
]


def load_results(folder: Path = RESULTS) -> dict[str, list[Claim]]:
    """Return the claims of every machine, each with the date of its result."""
    found: dict[str, list[Claim]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "claims" not in result:
            continue
        date = result["environment"]["date"]
        machine = machine_name(result["environment"])
        found.setdefault(machine, []).extend({**claim, "date": date} for claim in result["claims"])
    return found


def headline_tables(results: Mapping[str, Sequence[Claim]]) -> str:
    """Return README's table: one line a stage, against whom, the ratio, the memory."""
    parts = []
    for machine, claims in results.items():
        known = {(c["benchmark"], c["name"], c["against"]): c for c in claims}
        rows = []
        for title, *key in HEADLINES:
            claim = known.get(tuple(key))  # type: ignore[call-overload]
            if claim is None or claim["value"] is None:
                continue
            memory = "" if claim.get("peak_mib") is None else f"{claim['peak_mib']:,.0f} MiB"
            means = "faster" if claim["higher_is_better"] else "its time"
            rows.append((title, claim["against"], f"{_figure(claim)} {means}", memory))
        if rows:
            table = _table(("stage", "against", "", "our peak memory"), rows)
            parts.append(f"Measured on {machine}:\n\n{table}")
    return "\n\n".join(parts)


def performance_tables(results: Mapping[str, Sequence[Claim]]) -> str:
    """Return every claim of every machine, with spread, verdict and date."""
    parts = []
    for machine, claims in results.items():
        parts.append(f"## {machine}")
        for benchmark in dict.fromkeys(claim["benchmark"] for claim in claims):
            ours = [claim for claim in claims if claim["benchmark"] == benchmark]
            rows = [
                (
                    c["name"],
                    c["against"].replace("absolute", ""),
                    _figure(c),
                    _quartiles(c),
                    c["to_reach"],
                    c["verdict"],
                    c["note"],
                )
                for c in ours
            ]
            heads = ("claim", "against", "measured", "quartiles", "to reach", "verdict", "")
            parts.append(f"### {benchmark}, {max(c['date'] for c in ours)}\n\n{_table(heads, rows)}")
    return "\n\n".join(parts)


def scaling_table(path: Path) -> str:
    """Return the exponents of the scaling studies."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (
            s["name"],
            s["varies"],
            f"{s['sizes'][0]:,} – {s['sizes'][-1]:,}",
            f"{s['exponent']:.2f}",
            f"{s['expected']:g}",
        )
        for s in result["studies"]
    ]
    environment = result["environment"]
    where = f"{machine_name(environment)}, {environment['date']}, torch {environment['torch']}"
    return f"{where}:\n\n" + _table(("what", "with", "from – to", "exponent", "expected"), rows)


def rewritten(text: str, name: str, content: str) -> str:
    """Put `content` between the markers called `name`; raises ValueError when the page has none."""
    begin, end = BEGIN.format(name=name), END.format(name=name)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no markers {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def pages(results: Mapping[str, Sequence[Claim]]) -> dict[Path, str]:
    """Return the pages as they should stand."""
    readme, performance = ROOT / "README.md", ROOT / "docs" / "performance.md"
    text = rewritten(performance.read_text(encoding="utf-8"), "claims", performance_tables(results))
    scaling = sorted(RESULTS.glob("scaling-*.json"))
    if scaling:
        text = rewritten(text, "scaling", scaling_table(scaling[-1]))
    alignment = ROOT / "docs" / "alignment.md"
    quality = quality_tables(sorted(RESULTS.glob("quality-align-*.json")))
    return {
        alignment: rewritten(alignment.read_text(encoding="utf-8"), "quality", quality),
        readme: rewritten(readme.read_text(encoding="utf-8"), "headline", headline_tables(results)),
        performance: text,
    }


def _figure(claim: Claim) -> str:
    if claim["value"] is None:
        return "–"
    return (
        f"{claim['value']:,.0f} {claim['unit']}"
        if abs(claim["value"]) >= 100
        else f"{claim['value']:.3g} {claim['unit']}"
    )


def _quartiles(claim: Claim) -> str:
    return "" if claim.get("low") is None else f"{claim['low']:,.3g} – {claim['high']:,.3g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


if __name__ == "__main__":
    for page, text in pages(load_results()).items():
        page.write_text(text, encoding="utf-8")
