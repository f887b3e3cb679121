"""What the merge did: what it was chosen from, each target's weight by layer, sign conflicts, what was selected and
kept, and update norms."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from fusechat.artifact import PROVENANCE, Json, read_json
from fusechat.checkpoint import open_checkpoint
from fusechat.errors import FormatError
from fusechat.layout import Layout
from fusechat.merge.output import STATISTICS
from fusechat.merge.settings import layer_of
from fusechat.merge.sweep import TABLE
from fusechat.report.outcome import verdict


def merging(layout: Layout, config: Json) -> Json:
    """Return the merge's numbers by layer and by kind of matrix, weighted by elements.

    Raises FormatError when nothing is merged.
    """
    if not (layout.merged / PROVENANCE).exists():
        raise FormatError(f"nothing is merged yet: {layout.merged} is not there")
    facts = read_json(layout.merged / PROVENANCE)
    statistics: dict[str, Json] = read_json(layout.merged / STATISTICS)
    sizes = {name: entry.n_elements for name, entry in open_checkpoint(layout.merged).tensors.items()}
    merged = {name: stats for name, stats in statistics.items() if stats.get("weights")}
    by_layer: dict[int | None, list[str]] = {}
    by_kind: dict[str, list[str]] = {}
    for name in merged:
        by_layer.setdefault(layer_of(name), []).append(name)
        by_kind.setdefault(_kind(name), []).append(name)
    layers = sorted(by_layer, key=lambda layer: (layer is None, layer))
    targets = [Path(target).name for target in facts["targets"]]
    settings = facts.get("request", {}).get("parameters", {})
    return {
        "method": facts["method"],
        "parameters": {key: _plain(value) for key, value in settings.items()},
        "targets": targets,
        "n_tensors": facts["n_tensors"],
        "n_elements": facts["n_elements"],
        "mean_weight": facts.get("mean_weight"),
        "surviving_share": facts.get("surviving_share"),
        "warnings": facts.get("warnings", []),
        "by_layer": [
            {"layer": "other" if layer is None else str(layer), **_totals(by_layer[layer], merged, sizes)}
            for layer in layers
        ],
        "by_kind": [{"kind": kind, **_totals(names, merged, sizes)} for kind, names in by_kind.items()],
        "n_copied": len(statistics) - len(merged),
        "sweep": _sweep(layout.merged / TABLE),
    }


def _sweep(path: Path) -> Json | None:
    """Return the merges the merged model was chosen from, the best first; None where it was the only one."""
    if not path.exists():
        return None
    table = read_json(path)
    merges = table["merges"].items()
    tried = sorted(merges, key=lambda item: (item[0] != table["best"], item[1]["bits_per_byte"][0]))
    return {
        "best": table["best"],
        "n_dialogues": table["n_dialogues"],
        "merges": [
            {
                "name": name,
                "label": _label(name),
                "bits_per_byte": found["bits_per_byte"],
                "difference": found["difference_to_best"],
                "verdict": verdict(found["difference_to_best"]),
                "least_surviving": min(found["surviving_share"] or [], default=None),
            }
            for name, found in tried
        ],
    }


def _label(name: str) -> str:
    """Write a candidate's name (`sce variant=paper select_topk=0.1`) as papers do (sce paper, τ 0.1)."""
    method, *parameters = name.split(" ")
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        method += f" {value}" if key == "variant" else f", {'τ' if key == 'select_topk' else key} {value}"
    return method


def _kind(tensor: str) -> str:
    """Name a tensor without its layer's number and the words all tensors share."""
    parts = re.sub(r"\.\d+(?=\.)", "", tensor).removesuffix(".weight").split(".")
    return parts[-1] if len(parts) < 2 or parts[-2] in ("model", "layers") else ".".join(parts[-2:])


def _plain(value: Any) -> Any:
    rules = value if isinstance(value, list) else [[None, value]]
    if len(rules) == 1 and rules[0][0] is None and isinstance(rules[0][1], list) and len(rules[0][1]) == 1:
        return rules[0][1][0]
    return value


def _totals(names: list[str], statistics: dict[str, Json], sizes: dict[str, int]) -> Json:
    n = {name: sizes.get(name, 0) for name in names}
    n_elements = sum(n.values())

    def mean(key: str) -> float | None:
        values = [(statistics[name][key], n[name]) for name in names if statistics[name].get(key) is not None]
        total = sum(size for _, size in values)
        return sum(float(value) * size for value, size in values) / total if total else None

    weights = [statistics[name]["weights"] for name in names]
    energy = [statistics[name].get("update_norm") for name in names]
    squares = sum(float(e) ** 2 for e in energy if e is not None)
    return {
        "n_tensors": len(names),
        "n_elements": n_elements,
        "weights": [
            sum(w[j] * n[name] for w, name in zip(weights, names, strict=True)) / n_elements if n_elements else None
            for j in range(len(weights[0]))
        ],
        "sign_conflict_rate": mean("sign_conflict_rate"),
        "selected_share": _selected(names, statistics, n),
        "surviving_share": _surviving(names, statistics),
        "update_norm": math.sqrt(squares) if any(e is not None for e in energy) else None,
        "update_rms": math.sqrt(squares / n_elements) if n_elements and any(e is not None for e in energy) else None,
    }


def _selected(names: list[str], statistics: dict[str, Json], n: dict[str, int]) -> float | None:
    """Share of elements that set the weights; without a selection in a tensor, all of it."""
    if not any("update_norm" in statistics[name] for name in names):
        return None
    chosen = 0.0
    for name in names:
        k = statistics[name].get("k", n[name])
        chosen += sum(k) / len(k) if isinstance(k, list) else k
    total = sum(n.values())
    return chosen / total if total else None


def _surviving(names: list[str], statistics: dict[str, Json]) -> list[float | None] | None:
    """Share of each target's Σ δ² that survives."""
    told = [statistics[name] for name in names if "surviving_share" in statistics[name]]
    if not told:
        return None
    shares: list[float | None] = []
    for j in range(len(told[0]["surviving_share"])):
        total = sum(stats["measured_energy"][j] for stats in told)
        kept = sum(stats["surviving_share"][j] * stats["measured_energy"][j] for stats in told)
        shares.append(kept / total if total else None)
    return shares
