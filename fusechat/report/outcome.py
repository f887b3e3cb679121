"""Did fusion beat SFT? The answer first, then every model and category with its interval."""

from __future__ import annotations

import math
from typing import Any

from fusechat.artifact import Json, read_json
from fusechat.errors import FormatError
from fusechat.layout import Layout

_MERGED = "merged"


def outcome(layout: Layout, config: Json) -> Json:
    """Return the verdict and the table of results; raises FormatError when the run was not evaluated."""
    if not layout.results.exists():
        raise FormatError(f"the run is not evaluated yet: {layout.results} is not there")
    results = read_json(layout.results)
    groups = results["groups"]
    models = list(groups["overall"]["models"])
    key = next(k for k in groups["overall"]["models"][models[0]] if k.startswith("difference_to_"))
    against = key.removeprefix("difference_to_")
    fused = groups["overall"]["models"][_MERGED]
    targets = {m: groups["overall"]["models"][m]["bits_per_byte"][0] for m in models if m.startswith("target ")}
    best = min((m for m in targets if math.isfinite(targets[m])), key=lambda m: targets[m], default=None)
    control = groups["overall"]["models"][against]["bits_per_byte"][0]
    confidence = config.get("eval", {}).get("confidence", 0.95)
    table = [_group(name, group, models, key, confidence) for name, group in groups.items()]
    categories = {group["name"]: group["models"][_MERGED]["verdict"] for group in table[1:]}
    return {
        "against": against,
        "verdict": table[0]["models"][_MERGED]["verdict"],
        "difference": fused[key],
        "relative": fused[key][0] / control if control else math.nan,
        "bits_per_byte": {_MERGED: fused["bits_per_byte"][0], against: control},
        "best_target": best,
        "best_target_bits_per_byte": targets.get(best) if best else None,
        "merged_to_best": results.get("merged_to", {}).get(best, {}).get("difference"),
        "categories": {
            word: [name for name, found in categories.items() if found == word]
            for word in ("better", "worse", "undecided", "unknown")
        },
        "confidence": confidence,
        "bootstrap_samples": config.get("eval", {}).get("bootstrap_samples"),
        "n_dialogues": results["n_dialogues"],
        "excluded_dialogues": results["excluded_dialogues"],
        "not_scored": results.get("not_scored", {}),
        "content_bytes": groups["overall"]["content_bytes"],
        "significance": results.get("significance"),
        "models": models,
        "groups": table,
    }


def _group(name: str, group: Json, models: list[str], key: str, confidence: float) -> Json:
    cells = {}
    for model in models:
        cell = group["models"][model]
        # A category's interval stands alone, as the page says; what decides must stand the test as well.
        p = cell.get("p_holm") if name == "overall" else None
        cells[model] = {
            "bits_per_byte": cell["bits_per_byte"],
            "difference": cell[key],
            "p_holm": cell.get("p_holm"),
            "verdict": verdict(cell[key], p, confidence),
        }
    return {"name": name, "n_dialogues": group["n_dialogues"], "models": cells}


def verdict(difference: Any, p: float | None = None, confidence: float = 0.95) -> str:
    """Say what an interval (value, low, high) of a difference in bits per byte shows; lower is better.

    With a p-value both must speak: over few dialogues a bootstrap interval is too narrow, a permutation test is not.
    """
    value, low, high = (math.nan if x is None else float(x) for x in difference)
    if not all(map(math.isfinite, (value, low, high))):
        return "unknown"
    if p is not None and p >= 1 - confidence:
        return "undecided"
    return "better" if high < 0 else "worse" if low > 0 else "undecided"
