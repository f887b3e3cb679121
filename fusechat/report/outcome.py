"""Did fusion beat SFT? The answer first, then every model and category with its interval."""

from __future__ import annotations

import math
from typing import Any

from fusechat.artifact import Json, read_json
from fusechat.layout import Layout

_MERGED = "merged"


def outcome(layout: Layout, config: Json) -> Json:
    """Return the verdict and the table of results; raises FormatError when the run was not evaluated."""
    results = read_json(layout.results)
    groups = results["groups"]
    models = list(groups["overall"]["models"])
    key = next(k for k in groups["overall"]["models"][models[0]] if k.startswith("difference_to_"))
    against = key.removeprefix("difference_to_")
    fused = groups["overall"]["models"][_MERGED]
    targets = {m: groups["overall"]["models"][m]["bits_per_byte"][0] for m in models if m.startswith("target ")}
    best = min((m for m in targets if math.isfinite(targets[m])), key=lambda m: targets[m], default=None)
    control = groups["overall"]["models"][against]["bits_per_byte"][0]
    categories = {name: verdict(group["models"][_MERGED][key]) for name, group in groups.items() if name != "overall"}
    return {
        "against": against,
        "verdict": verdict(fused[key]),
        "difference": fused[key],
        "relative": fused[key][0] / control if control else math.nan,
        "bits_per_byte": {_MERGED: fused["bits_per_byte"][0], against: control},
        "best_target": best,
        "best_target_bits_per_byte": targets.get(best) if best else None,
        "categories": {
            word: [name for name, found in categories.items() if found == word]
            for word in ("better", "worse", "undecided", "unknown")
        },
        "confidence": config.get("eval", {}).get("confidence", 0.95),
        "bootstrap_samples": config.get("eval", {}).get("bootstrap_samples"),
        "n_dialogues": results["n_dialogues"],
        "excluded_dialogues": results["excluded_dialogues"],
        "content_bytes": groups["overall"]["content_bytes"],
        "significance": results.get("significance"),
        "models": models,
        "groups": [
            {
                "name": name,
                "n_dialogues": group["n_dialogues"],
                "models": {
                    model: {
                        "bits_per_byte": group["models"][model]["bits_per_byte"],
                        "difference": group["models"][model][key],
                        "p_holm": group["models"][model].get("p_holm"),
                    }
                    for model in models
                },
            }
            for name, group in groups.items()
        ],
    }


def verdict(difference: Any) -> str:
    """Say what an interval (value, low, high) of a difference in bits per byte shows; lower is better."""
    value, low, high = (math.nan if x is None else float(x) for x in difference)
    if not all(map(math.isfinite, (value, low, high))):
        return "unknown"
    return "better" if high < 0 else "worse" if low > 0 else "undecided"
