"""Several runs side by side: what each came to, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from fusechat import __version__
from fusechat.artifact import Json
from fusechat.errors import ConfigError
from fusechat.layout import Layout
from fusechat.report.charts import data, differences_axis, finished, printable, series
from fusechat.report.facts import gather, run_settings
from fusechat.report.page import render
from fusechat.report.paired import conclude_paired, headline, kept_scores, paired_runs
from fusechat.report.words import listed, model

_LIVES_ELSEWHERE = "out"


def compare(runs: Sequence[Path]) -> Json:
    """Return the facts of several runs, the settings in which they differ, and what forbids comparing them.

    Raises ConfigError for fewer than two runs, for one given twice, and for a folder that is no run's.
    """
    if len(runs) < 2:
        raise ConfigError("give at least two runs to compare; `fusechat report RUN` shows one")
    folders = [Path(run).resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError("a run is given twice: name each once")
    layouts = {name: Layout(out=folder) for name, folder in zip(unique_names(folders), folders, strict=True)}
    facts = {name: gather(layout) for name, layout in layouts.items()}
    settings = {name: _flat(run_settings(layout)) for name, layout in layouts.items()}
    keys = dict.fromkeys(key for flat in settings.values() for key in flat)
    differing = {
        key: {name: flat.get(key) for name, flat in settings.items()}
        for key in keys
        if key != _LIVES_ELSEWHERE and len({repr(flat.get(key)) for flat in settings.values()}) > 1
    }
    paired = paired_runs({name: kept_scores(layout) for name, layout in layouts.items()})
    return {
        "fusechat_version": __version__,
        "headline": headline(paired),
        "conclusions": conclude_paired(paired),
        "runs": {name: _line(one) for name, one in facts.items()},
        "settings": differing,
        "warnings": _warnings(facts),
        "paired": paired,
    }


def compare_page(compared: Json) -> str:
    """Return the comparison as one HTML document that needs no network."""
    shown = printable(compared)
    names = [name for name, run in shown["runs"].items() if run["difference"]]
    drawn: dict[str, Json] = {}
    if names:
        groups = list(dict.fromkeys(group for name in names for group in shown["runs"][name]["groups"]))
        of_run = {name: shown["runs"][name]["groups"] for name in names}
        drawn["runs"] = finished(_forest(of_run, groups, "the control"))
    if shown["paired"]:
        against, by_group = shown["paired"]["against"], shown["paired"]["groups"]
        others = [name for name in next(iter(by_group.values())) if name != against]
        of_run = {name: {group: by_run[name]["difference"] for group, by_run in by_group.items()} for name in others}
        drawn["paired"] = finished(_forest(of_run, list(by_group), against, all_names=list(shown["runs"])))
    return render("compare.html.j2", drawn, compared=compared)


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Name folders by as few of their last parts as tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}{key}.").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in _flat(part, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): value}


def _line(facts: Json) -> Json:
    outcome, alignment, cost = facts["outcome"], facts["alignment"], facts["cost"]
    coverage = {
        name: None if source["rows"]["none"] is None else 1 - source["rows"]["none"]
        for name, source in alignment.get("by_source", {}).items()
    }
    line: Json = {
        "missing": outcome.get("missing"),
        "against": outcome.get("against"),
        "difference": outcome.get("difference"),
        "verdict": outcome.get("verdict", "unknown"),
        "bits_per_byte": None,
        "control": None,
        "best_target": outcome.get("best_target"),
        "best_target_bits_per_byte": outcome.get("best_target_bits_per_byte"),
        "groups": {},
        "coverage": coverage,
        "seconds": cost.get("seconds"),
        "peak_memory_bytes": cost.get("peak_memory_bytes"),
    }
    if "missing" not in outcome:
        line["bits_per_byte"] = outcome["groups"][0]["models"]["merged"]["bits_per_byte"]
        line["control"] = outcome["bits_per_byte"][outcome["against"]]
        line["groups"] = {group["name"]: group["models"]["merged"]["difference"] for group in outcome["groups"]}
    return line


def _warnings(facts: dict[str, Json]) -> list[str]:
    found = []
    texts = {name: one["provenance"].get("held_out_fingerprint") for name, one in facts.items()}
    if len({text for text in texts.values() if text}) > 1:
        found.append(
            "The held-out dialogues differ between these runs: compare their differences to their own control with "
            "care, and their bits per byte not at all."
        )
    controls = {name: one["outcome"].get("against") for name, one in facts.items() if "missing" not in one["outcome"]}
    if len(set(controls.values())) > 1:
        said = [f"{name} with {model(str(against))}" for name, against in controls.items()]
        found.append(f"The runs are compared with different models: {listed(said)}.")
    trained = {one["provenance"].get("dataset_fingerprint") for one in facts.values()} - {None}
    if len(trained) > 1:
        found.append("The runs were fused on different dialogues.")
    return found


def _forest(
    of_run: dict[str, dict[str, Any]], groups: list[str], against: str, all_names: list[str] | None = None
) -> Any:
    """Draw [value, low, high] by group and run; with `all_names` a run has one colour and shape in every chart."""
    names, rows = list(of_run), []
    for group in groups:
        for name in names:
            value, low, high = of_run[name].get(group, (None, None, None))
            shown = "" if None in (value, low, high) else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
            rows.append({"group": group, "run": name, "difference": value, "low": low, "high": high, "interval": shown})
    by_run = series("run", all_names or names, names)
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("group:N", sort=groups, title=None),
        yOffset=alt.YOffset("run:N", sort=names),
        color=by_run["color"],
        tooltip=["run:N", "group:N", "interval:N"],
    )
    x = alt.X("low:Q", title=f"bits per byte against {against}", axis=differences_axis())
    zero = alt.Chart(data([{"at": 0}])).mark_rule(stroke="var(--ink)").encode(x="at:Q")
    return alt.layer(
        zero,
        base.mark_rule(strokeWidth=3, strokeCap="round").encode(x=x, x2="high:Q"),
        base.mark_point(filled=True, size=80, opacity=1).encode(x="difference:Q", shape=by_run["shape"]),
    ).properties(height={"step": 14 + 10 * len(names), "for": "position"})
