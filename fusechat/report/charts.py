"""The report's charts as Vega-Lite, through altair. Colours are the page's CSS variables, so that one drawing serves
light, dark and print; sources and targets differ by shape as well as by colour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import altair as alt

from fusechat.artifact import Json
from fusechat.readable import readable
from fusechat.report.words import model

N_COLOURS = 7
_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right")
_KINDS = {"same": "var(--same)", "coarser": "var(--coarser)", "finer": "var(--finer)", "none": "var(--none)"}
_FATES = {"exact": "var(--same)", "approximate": "var(--coarser)", "lost": "var(--lost)"}
_CONFIG: Json = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)", "titleColor": "var(--muted)", "gridColor": "var(--grid)", "domain": False,
        "ticks": False, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelPadding": 6,
        "labelLimit": 170,
    },
    "legend": {
        "labelColor": "var(--ink)", "titleColor": "var(--muted)", "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "orient": "top", "labelLimit": 180, "symbolStrokeWidth": 0,
    },
    "title": {"color": "var(--ink)", "fontSize": 13, "anchor": "start", "fontWeight": 600},
}  # fmt: skip


def charts(facts: Json) -> dict[str, Json]:
    """Return every chart the facts have the numbers for, by name, in Vega-Lite."""
    makers = {
        "outcome": _outcome,
        "sources": _sources,
        "alignment": _alignment,
        "training": _training,
        "merge": _merge,
        "cost": _cost,
    }
    drawn: dict[str, Any] = {}
    for section, make in makers.items():
        if "missing" not in facts[section]:
            drawn |= make(printable(facts[section]))
    return {name: finished(chart) for name, chart in drawn.items()}


def printable(value: Any) -> Any:
    """Return JSON values with what cannot be shown escaped: Vega's expressions do not read a name with U+2028."""
    if isinstance(value, dict):
        return {printable(key): printable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [printable(part) for part in value]
    return readable(value) if isinstance(value, str) else value


def finished(chart: Any) -> Json:
    """Return a chart in the report's style, as wide as its place on the page."""
    specification: Json = chart.properties(width="container").configure(**_CONFIG).to_dict()
    return specification


def data(rows: list[Json]) -> Any:
    """Return rows as a chart's own data."""
    return alt.Data(values=rows)  # type: ignore[no-untyped-call]


def _colours(names: list[str]) -> Any:
    return alt.Scale(domain=names, range=[f"var(--c{1 + i % N_COLOURS})" for i in range(len(names))])


def _shapes(names: list[str]) -> Any:
    return alt.Scale(domain=names, range=[_SHAPES[i % len(_SHAPES)] for i in range(len(names))])


def series(field: str, names: list[str], drawn: list[str] | None = None) -> Json:
    """Return the encoding of a series by colour and shape alike, with one legend where there is more than one name.

    Of `names`, which set colours and shapes, the legend shows `drawn`, or all.
    """
    # Two columns of long names are wider than a phone.
    columns = 1 if max(map(len, names)) > 14 else 2
    legend = alt.Legend(title=None, columns=columns, values=drawn or names) if len(names) > 1 else None
    return {
        "color": alt.Color(f"{field}:N", scale=_colours(names), legend=legend),
        "shape": alt.Shape(f"{field}:N", scale=_shapes(names), legend=legend),
    }


def _share_axis(title: str) -> Any:
    return alt.X("share:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=5))


def _outcome(o: Json) -> dict[str, Any]:
    overall, *categories = o["groups"]
    models = [m for m in o["models"] if m.startswith("target ") or m == "merged"]
    against = model(o["against"])
    drawn = {"overall": _forest([_told(m, overall["models"][m]) for m in models], against)}
    if categories:
        drawn["categories"] = _forest([_told(g["name"], g["models"]["merged"]) for g in categories], against)
    return drawn


def _told(label: str, cell: Json) -> Json:
    value, low, high = cell["difference"]
    shown = "" if None in (value, low, high) else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    verdict = cell["verdict"]
    return {"label": label, "difference": value, "low": low, "high": high, "interval": shown, "verdict": verdict}


def _forest(rows: list[Json], against: str) -> Any:
    verdicts = alt.Scale(
        domain=["better", "worse", "undecided"], range=["var(--better)", "var(--worse)", "var(--muted)"]
    )
    lines = max((row["label"].count(", ") + 1 for row in rows), default=1)
    labels = alt.Axis(labelExpr="split(datum.label, ', ')") if lines > 1 else alt.Axis()
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("label:N", sort=None, title=None, axis=labels),
        color=alt.Color("verdict:N", scale=verdicts, legend=None),
        tooltip=[alt.Tooltip("label:N", title="model"), alt.Tooltip("interval:N", title="difference"), "verdict:N"],
    )
    x = alt.X(
        "low:Q",
        title=f"bits per byte against {against}",
        scale=alt.Scale(zero=True, nice=True),
        axis=differences_axis(),
    )
    zero = alt.Chart(data([{"at": 0}])).mark_rule(stroke="var(--ink)", strokeWidth=1).encode(x="at:Q")
    shape = alt.Shape(
        "verdict:N",
        scale=alt.Scale(domain=["better", "worse", "undecided"], range=["circle", "cross", "diamond"]),
        legend=None,
    )
    return alt.layer(
        zero,
        base.mark_rule(strokeWidth=3, strokeCap="round").encode(x=x, x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(x="difference:Q", shape=shape),
    ).properties(height=alt.Step(16 + 14 * lines))


def differences_axis() -> Any:
    """Return an axis of signed differences."""
    return alt.Axis(tickCount=5, labelExpr="datum.value == 0 ? '0' : format(datum.value, '+.3~g')")


def _sources(s: Json) -> dict[str, Any]:
    names = list(s["by_source"])
    drawn: dict[str, Any] = {}
    for part, title in (("by_category", None), ("by_length", "bytes")):
        rows = [
            {"source": name, "group": g["name"], "share": g["share"], "order": i,
             "rows": f"{g['n_rows_won']:,} of {g['n_rows']:,}"}
            for name in names
            for i, g in enumerate(s["by_source"][name][part])
        ]  # fmt: skip
        if not rows:
            continue
        y = alt.Y("group:N", sort=alt.EncodingSortField("order", op="min"), title=title)
        drawn[f"won_{part}"] = (
            alt.Chart(data(rows))
            .mark_point(filled=True, size=80, opacity=0.9)
            .encode(
                x=_share_axis("share of rows won"),
                y=y,
                yOffset=alt.YOffset("source:N", sort=names),
                tooltip=["source:N", "group:N", alt.Tooltip("share:Q", format=".1%"), "rows:N"],
                **series("source", names),
            )
            .properties(height={"step": 12 + 9 * len(names), "for": "position"})
        )
    for i, name in enumerate(names):
        drawn[f"scatter_{i}"] = _scatter(name, s["by_source"][name]["points"], i)
    return drawn


def _scatter(name: str, points: list[Any], number: int) -> Any:
    rows = [{"pivot": p, "source": q, "teaches": name if won else "nothing"} for p, q, won in points]
    known = sorted(v for p, q, _ in points for v in (p, q) if v is not None)
    # A few very short dialogues would squeeze all others into a corner: they stand at the edge.
    limit = 1.1 * known[int(0.99 * (len(known) - 1))] if known else 1.0
    line = alt.Chart(data([{"pivot": 0, "source": 0}, {"pivot": limit, "source": limit}]))
    scale = alt.Scale(domain=[0, limit], nice=False, clamp=True)
    teaches = alt.Scale(domain=[name, "nothing"], range=[f"var(--c{1 + number % N_COLOURS})", "var(--muted)"])
    shapes = alt.Scale(domain=[name, "nothing"], range=[_SHAPES[number % len(_SHAPES)], "cross"])
    return alt.layer(
        line.mark_line(stroke="var(--ink)", strokeWidth=1, strokeDash=[4, 3]).encode(x="pivot:Q", y="source:Q"),
        alt.Chart(data(rows))
        .mark_point(filled=True, size=22, opacity=0.55)
        .encode(
            x=alt.X("pivot:Q", title="pivot, bits per byte", scale=scale, axis=alt.Axis(tickCount=4)),
            y=alt.Y("source:Q", title="source, bits per byte", scale=scale, axis=alt.Axis(tickCount=4)),
            color=alt.Color("teaches:N", scale=teaches, legend=None),
            shape=alt.Shape("teaches:N", scale=shapes, legend=None),
            tooltip=["pivot:Q", "source:Q", "teaches:N"],
        ),
        title=name,
    ).properties(height=230)


def _stacked(rows: list[Json], colours: dict[str, str], title: str) -> Any:
    names = list(colours)
    return (
        alt.Chart(data(rows))
        .mark_bar(height=18)
        .encode(
            x=alt.X("share:Q", title=title, stack="zero", scale=alt.Scale(domain=[0, 1]),
                    axis=alt.Axis(format="%", tickCount=5)),
            y=alt.Y("source:N", sort=None, title=None),
            color=alt.Color("part:N", scale=alt.Scale(domain=names, range=list(colours.values())),
                            sort=names, legend=alt.Legend(title=None, columns=4, symbolType="square")),
            order=alt.Order("order:Q"),
            tooltip=["source:N", "part:N", alt.Tooltip("share:Q", format=".2%")],
        )
        .properties(height=alt.Step(30))
    )  # fmt: skip


def _alignment(a: Json) -> dict[str, Any]:
    if not a["by_source"]:
        return {}

    def rows(key: str, parts: list[str]) -> list[Json]:
        return [
            {"source": name, "part": part, "order": i, "share": source[key][part]}
            for name, source in a["by_source"].items()
            for i, part in enumerate(parts)
        ]

    return {
        "coverage": _stacked(rows("rows", list(_KINDS)), _KINDS, "share of the pivot's rows"),
        "mass": _stacked(rows("mass", list(_FATES)), _FATES, "share of the source's stored probability"),
    }


CURVES = {
    "loss": "loss, nats per row",
    "hard_loss": "hard term, nats per row",
    "soft_loss": "soft term, nats per row",
    "held_out_bits_per_byte": "held-out bits per byte",
    "tokens_per_second": "tokens per second",
}


def _training(t: Json) -> dict[str, Any]:
    names = [model(name) for name in t["by_target"]]
    drawn = {}
    for key, title in CURVES.items():
        rows = [
            {"target": model(name), "step": point["step"], "value": point[key], "marked": i % _stride(target) == 0}
            for name, target in t["by_target"].items()
            for i, point in enumerate(target["curve"])
            if point.get(key) is not None and _has(target["curve"], key)
        ]
        if not rows:
            continue
        base = alt.Chart(data(rows)).encode(
            x=alt.X("step:Q", title="optimiser step", axis=alt.Axis(tickCount=5, grid=False)),
            y=alt.Y(
                "value:Q",
                title=title,
                scale=alt.Scale(zero=key == "tokens_per_second"),  # a rate has a true zero, a loss has none
                axis=alt.Axis(tickCount=5),
            ),
            color=series("target", names)["color"],
        )
        points = (
            base.transform_filter("datum.marked")
            .mark_point(filled=True, size=40, opacity=1)
            .encode(
                tooltip=["target:N", "step:Q", alt.Tooltip("value:Q", format=",.4~f")],
                shape=series("target", names)["shape"],
            )
        )
        drawn[f"training_{key}"] = alt.layer(base.mark_line(strokeWidth=1.5), points).properties(height=220)
    return drawn


def _has(curve: list[Json], key: str) -> bool:
    """Whether a curve is there to be drawn: the control has no soft term, only zeros."""
    return key != "soft_loss" or any(point.get(key) for point in curve)


def _stride(target: Json) -> int:
    """A mark for about every fifteenth of a curve is enough to tell it from the others."""
    return max(1, len(target["curve"]) // 15)


def _merge(m: Json) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    if m["sweep"] and len(m["sweep"]["merges"]) > 1:
        others = [_told(one["label"], one) for one in m["sweep"]["merges"][1:]]
        drawn["sweep"] = _forest(others, "the chosen merge")
    layers = [part["layer"] for part in m["by_layer"]]
    if len(m["targets"]) > 1:
        drawn["eta"] = _heat_map(m, layers)
    measures: dict[str, Callable[[Json], float | None]] = {
        "signs in conflict": lambda part: part["sign_conflict_rate"],
        "selected": lambda part: part["selected_share"],
        "update that survives": lambda part: _mean(part["surviving_share"]),
    }
    rows = [
        {"kind": part["kind"], "share": share, "measure": measure}
        for part in m["by_kind"]
        for measure, of in measures.items()
        if (share := of(part)) is not None
    ]
    names = [measure for measure in measures if any(row["measure"] == measure for row in rows)]
    if rows:
        drawn["by_kind"] = (
            alt.Chart(data(rows))
            .mark_point(filled=True, size=80, opacity=0.9)
            .encode(
                x=_share_axis("share"),
                y=alt.Y("kind:N", sort=None, title=None, axis=alt.Axis(grid=True)),
                tooltip=["kind:N", "measure:N", alt.Tooltip("share:Q", format=".1%")],
                **series("measure", names),
            )
            .properties(height=alt.Step(24))
        )
    for key, part, label in (("by_layer", "layer", "layer"), ("by_kind", "kind", None)):
        rms = [{"at": p[part], "rms": p["update_rms"], "norm": p["update_norm"]} for p in m[key]]
        if any(row["rms"] is not None for row in rms):
            drawn[f"norm_{key}"] = _norms(rms, label)
    return drawn


def _mean(values: list[float | None] | None) -> float | None:
    known = [v for v in values or () if v is not None]
    return sum(known) / len(known) if known else None


def _shares(weights: list[float | None]) -> list[float | None]:
    """Return weights over their sum: SCE's are that, a linear merge's are as its recipe spells them."""
    total = sum(weight for weight in weights if weight is not None)
    return [weight / total if weight is not None and total else None for weight in weights]


def _heat_map(m: Json, layers: list[str]) -> Any:
    even = 1 / len(m["targets"])
    rows = [
        {"layer": part["layer"], "target": target, "eta": eta}
        for part in m["by_layer"]
        for target, eta in zip(m["targets"], _shares(part["weights"]), strict=True)
    ]
    reach = max(0.05, *(abs(row["eta"] - even) for row in rows if row["eta"] is not None))
    scale = alt.Scale(scheme="blueorange", domain=[even - reach, even + reach], clamp=True)
    base = alt.Chart(data(rows)).encode(
        x=alt.X("layer:N", sort=layers, title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("target:N", sort=m["targets"], title=None),
    )
    cells = base.mark_rect(stroke="var(--paper)", strokeWidth=2).encode(
        color=alt.Color("eta:Q", scale=scale, legend=alt.Legend(title=f"η; {even:.2f} is an equal share",
                                                               format=".2f", tickCount=5, gradientLength=160)),
        tooltip=["target:N", "layer:N", alt.Tooltip("eta:Q", title="η", format=".4f")],
    )  # fmt: skip
    if len(layers) > 12:
        return cells.properties(height=alt.Step(34))
    numbers = base.mark_text(fontSize=12).encode(
        text=alt.Text("eta:Q", format=".2f"),
        color=alt.condition(abs(alt.datum.eta - even) > 0.75 * reach, alt.value("#fff"), alt.value("#222")),
    )
    return alt.layer(cells, numbers).properties(height=alt.Step(34))


def _norms(rows: list[Json], label: str | None) -> Any:
    x = alt.X("rms:Q", title="update, root mean square", axis=alt.Axis(tickCount=4, format="~g"))
    tooltip = [
        alt.Tooltip("at:N", title=label or "kind"),
        alt.Tooltip("rms:Q", format=".3~g"),
        alt.Tooltip("norm:Q", title="norm", format=".4~g"),
    ]
    return (
        alt.Chart(data(rows))
        .mark_bar(color="var(--c1)", height={"band": 0.7})
        .encode(x=x, y=alt.Y("at:N", sort=None, title=label), tooltip=tooltip)
        .properties(height=alt.Step(22))
    )


def _cost(c: Json) -> dict[str, Any]:
    rows = [
        {"stage": stage["name"], "seconds": stage["seconds"], "kind": stage["name"].partition(" ")[0]}
        for stage in c["stages"]
    ]
    return {
        "cost": alt.Chart(data(rows))
        .mark_bar(color="var(--c1)", height={"band": 0.7})
        .encode(
            x=alt.X("seconds:Q", title="seconds", axis=alt.Axis(tickCount=5)),
            y=alt.Y("stage:N", sort=None, title=None),
            tooltip=["stage:N", alt.Tooltip("seconds:Q", format=",.1f")],
        )
        .properties(height=alt.Step(22))
    }
