"""The tables of README and of docs/performance.md, alignment.md and plan.md from bench/results/*.json; a test finds
stale ones.

    python bench/tables.py

A table holds the figures of one machine; results of other machines get tables of their own. Of several results of one
machine the newest has the word, claim by claim. README shows the machine with most of the headline's lines, of equals
the one measured last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.bench.machine import machine_name
from fusechat.bench.quality_tables import quality_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- {name}: written by `make readme-table` -->", "<!-- end of {name} -->"
Claim = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """One line of README's table: the claim it shows, and where that claim's memory stands."""

    stage: str
    claim: tuple[str, str, str]
    """Benchmark, name, against."""
    against: str = ""
    """In README's words, where the benchmark's own are too short or say nothing."""
    memory: tuple[str, str, str] | None = None
    """The claim that is about memory; where absent, the note of the other may say it."""


_PADDED, _BYTES = "pad to 2,048, all logits in fp16", "align, bytes + ms, store to store"

# One line a stage and peer.
HEADLINES = [
    Headline(
        stage="extract: top-10 of every row, transformers",
        claim=("extract", "hf, time", _PADDED),
        against="padded to 2,048, all logits kept in fp16",
        memory=("extract", "hf, extra memory", _PADDED),
    ),
    Headline(
        stage="align: by bytes, vocab ms, store to store",
        claim=("align", _BYTES, "absolute"),
        memory=("align", f"{_BYTES}, peak memory", "absolute"),
    ),
    Headline(stage="align: warping as in the paper", claim=("align", "dtw, one pair, 2048 tokens", "plain Python")),
    Headline(
        stage="loss on K sparse targets",
        claim=("loss", "sparse_soft_ce, float32", "gather and autograd"),
        against="gather and autograd in torch",
    ),
    Headline(
        stage="loss, collation included",
        claim=("loss", "collate and loss, B=4 S=512", "dense targets, as the research code"),
        memory=("loss", "collate and loss, B=4 S=512, memory saved", "dense targets"),
    ),
    Headline(
        stage="loss with lm_head, K sparse targets",
        claim=("linear-loss", "linear_sparse_soft_ce, float32", "its three bare products"),
        against="its three matrix products alone",
    ),
    Headline(
        stage="loss with lm_head, hard labels",
        claim=("linear-loss", "with lm_head, hard labels", "cut-cross-entropy, torch.compile"),
    ),
    Headline(
        stage="loss with lm_head, KL to a teacher",
        claim=("linear-loss", "with lm_head, KL to a teacher", "liger-kernel, chunked, compiled"),
    ),
    Headline(
        stage="train: several dialogues a row",
        claim=("train", "packed tokens a second", "padded"),
        against="padded rows",
    ),
    Headline(stage="merge: SCE, τ = 0.1, 0.47B", claim=("merge", "sce 0.1", "mergekit 0.1.5")),
    Headline(stage="merge: SCE, 152k × 1,024 embedding", claim=("merge", "sce 0.1, wide embedding", "mergekit 0.1.5")),
    Headline(stage="merge: linear, 0.12B", claim=("merge", "linear", "mergekit 0.1.5")),
]

# How the benchmarks' notes say whose memory is how much.
_WHOSE_MIB = (
    re.compile(r"(?P<theirs>\+[\d,]+) MiB against our (?P<ours>\+[\d,]+)"),
    re.compile(r"^(?P<ours>\d+) against (?P<theirs>\d+) MiB"),
    re.compile(r"its peak (?P<theirs>[\d,]+) MiB"),
)


def load_results(folder: Path = RESULTS) -> dict[str, list[Claim]]:
    """Return every machine's claims, the newest machine first, each claim from its newest result and with its date."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    results = sorted((r for r in results if "claims" in r), key=lambda r: str(r["environment"]["date"]))
    found: dict[str, dict[tuple[str, ...], Claim]] = {}
    for result in results:
        claims = found.pop(machine_name(result["environment"]), {})
        for claim in result["claims"]:
            known = claims.get(_key(claim))
            # What an older result measured is not lost to a newer one that could not.
            if known is None or claim["value"] is not None or known["value"] is None:
                claims[_key(claim)] = {**claim, "date": result["environment"]["date"]}
        found[machine_name(result["environment"])] = claims
    return {machine: list(claims.values()) for machine, claims in reversed(found.items())}


def headline_table(results: Mapping[str, Sequence[Claim]]) -> str:
    """Return README's table: one line a stage, against whom, the ratio, the memory."""
    shown = {machine: _headlines(claims) for machine, claims in results.items()}
    # Of equals the one whose oldest line is newest, else the first.
    machine = max(shown, key=lambda name: (len(shown[name]), min((c["date"] for _, c in shown[name]), default="")))
    others = [name for name in results if name != machine]
    heading = f"Measured on {machine}, {max(claim['date'] for claim in results[machine])}"
    heading += f"; {' and '.join(others)} in [performance](docs/performance.md):" if others else ":"
    return f"{heading}\n\n" + _table(
        ("stage", "against", "fusechat", "memory, ours and theirs"), _headline_rows(shown[machine], results[machine])
    )


def _headlines(claims: Sequence[Claim]) -> list[tuple[Headline, Claim]]:
    known = {_key(claim): claim for claim in claims if claim["value"] is not None}
    return [(line, known[line.claim]) for line in HEADLINES if line.claim in known]


def _headline_rows(shown: Sequence[tuple[Headline, Claim]], claims: Sequence[Claim]) -> list[tuple[str, ...]]:
    known = {_key(claim): claim for claim in claims}
    return [
        (
            line.stage,
            line.against or claim["against"].replace("absolute", "–"),
            _said(claim),
            _memory(line, known.get(line.memory or line.claim)),
        )
        for line, claim in shown
    ]


def _said(claim: Claim) -> str:
    words = ""
    if claim["unit"] == "×":
        words = " faster" if claim["higher_is_better"] else " their time"
    return f"{_figure(claim)}{words}{_short(claim)}"


def _memory(line: Headline, claim: Claim | None) -> str:
    """Return whose memory is how much; a + is what comes on top of the inputs."""
    if claim is None or claim["value"] is None:
        return ""
    short = _short(claim) if line.memory else ""
    found = next((match.groupdict() for form in _WHOSE_MIB if (match := form.search(claim["note"]))), None)
    if found is not None:
        ours = found.get("ours") or f"{claim['peak_mib']:.0f}"
        return f"{_grouped(ours)} MiB against {_grouped(found['theirs'])}{short}"
    less = " less" if claim["higher_is_better"] else ""
    return f"{_figure(claim)}{less}{short}" if line.memory else ""


def _short(claim: Claim) -> str:
    return f", short of {claim['to_reach']} {claim['unit']}" if claim["verdict"] == "short" else ""


def _grouped(digits: str) -> str:
    return "+" * digits.startswith("+") + f"{int(digits.replace(',', '')):,}"


def _key(claim: Claim) -> tuple[str, ...]:
    return claim["benchmark"], claim["name"], claim["against"]


def performance_tables(results: Mapping[str, Sequence[Claim]]) -> str:
    """Return every claim of every machine, with spread, verdict and date."""
    parts = []
    for machine, claims in results.items():
        parts.append(f"## {machine}")
        for benchmark in sorted({claim["benchmark"] for claim in claims}):
            ours = [claim for claim in claims if claim["benchmark"] == benchmark]
            rows = [(_what(c), _measured(c), _verdict(c)) for c in ours]
            heads = ("claim", "measured (quartiles)", "asked for")
            dates = " to ".join(dict.fromkeys(pick(c["date"] for c in ours) for pick in (min, max)))
            parts.append(f"### {benchmark}, {dates}\n\n{_table(heads, rows)}")
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


def prediction_table(results: Mapping[str, Sequence[Claim]]) -> str:
    """Return what the plan said of every stage's peak memory beside what was measured, on the newest such machine."""
    planned = {machine: [c for c in claims if c["benchmark"] == "plan"] for machine, claims in results.items()}
    machine, claims = next((machine, claims) for machine, claims in planned.items() if claims)
    rows = []
    for claim in claims:
        figures = re.match(r"predicted (\d+) MB, measured (\d+) MB; beyond the process (\d+) and (\d+);", claim["note"])
        assert figures is not None, claim["note"]
        predicted, measured, *beyond = map(int, figures.groups())
        sizes = [f"{size:,} MB" for size in (predicted, measured, *beyond)]
        what = claim["name"].removeprefix("plan: ")
        rows.append((what, *sizes[:2], f"{predicted / measured - 1:+.1%}", *sizes[2:]))
    heads = ("stage, parameters", "predicted", "measured", "off", "predicted beyond the process", "measured beyond it")
    return f"Peak resident size, {machine}, {max(c['date'] for c in claims)}:\n\n{_table(heads, rows)}"


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
    plan = ROOT / "docs" / "plan.md"
    alignment = ROOT / "docs" / "alignment.md"
    quality = quality_tables(sorted(RESULTS.glob("quality-align-*.json")))
    return {
        alignment: rewritten(alignment.read_text(encoding="utf-8"), "quality", quality),
        readme: rewritten(readme.read_text(encoding="utf-8"), "headline", headline_table(results)),
        performance: text,
        plan: rewritten(plan.read_text(encoding="utf-8"), "predictions", prediction_table(results)),
    }


def _what(claim: Claim) -> str:
    against = "" if claim["against"] in ("", "absolute") else f", against {claim['against']}"
    note = f"<br><small>{claim['note']}</small>" if claim["note"] else ""
    return f"{claim['name']}{against}{note}"


def _measured(claim: Claim) -> str:
    if claim.get("low") is None:
        return _figure(claim)
    return f"{_figure(claim)} ({_number(claim['low'])} – {_number(claim['high'])})"


def _verdict(claim: Claim) -> str:
    return f"{claim['to_reach']}: {claim['verdict']}" if claim["to_reach"] else str(claim["verdict"])


def _figure(claim: Claim) -> str:
    return "–" if claim["value"] is None else f"{_number(claim['value'])} {claim['unit']}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


if __name__ == "__main__":
    for page, text in pages(load_results()).items():
        page.write_text(text, encoding="utf-8")
