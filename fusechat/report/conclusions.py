"""What to conclude from each section, in sentences; the first of them is the section's answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusechat.artifact import Json
from fusechat.layout import SFT
from fusechat.report.words import duration, listed, model, number, percent, plural, probability, signed, size

_CLOSE = 0.02


def conclude(facts: Json) -> dict[str, list[str]]:
    """Return the sentences of every section that is there."""
    return {name: tell(facts[name]) for name, tell in _TELL.items() if "missing" not in facts[name]}


def headline(outcome: Json) -> str:
    """Return the one answer on top of the report."""
    if "missing" in outcome:
        return "Not evaluated yet"
    against = _against(outcome)
    return {
        "better": f"Yes, fusion beat {against}",
        "worse": f"No, fusion did worse than {against}",
        "undecided": f"No difference to {against} is shown",
        "unknown": f"Unknown: the comparison with {against} holds numbers that are not finite",
    }[outcome["verdict"]] + ("" if outcome["against"] == SFT else ", but no SFT control was trained")


def _against(outcome: Json) -> str:
    return model(outcome["against"]) if outcome["against"] == SFT else f"the {outcome['against']}"


def _outcome(o: Json) -> list[str]:
    value, low, high = o["difference"]
    against = _against(o)
    relative = "" if o["relative"] is None else f" ({signed(100 * o['relative'], 1)} %)"
    told = [
        f"The merged model needs {number(o['bits_per_byte']['merged'])} bits per byte on text nobody trained on, "
        f"{against} {number(o['bits_per_byte'][o['against']])}: a difference of {signed(value)}{relative}, "
        f"{percent(o['confidence'])} interval {signed(low)} to {signed(high)}, paired over "
        f"{plural(o['n_dialogues'], 'held-out dialogue')}. Lower is better."
    ]
    p_holm = o["groups"][0]["models"]["merged"]["p_holm"]
    if p_holm is not None:
        told[0] += f" By a permutation test, adjusted for the number of models, p {probability(p_holm)}"
        told[0] += "." if o["verdict"] != "undecided" or low <= 0 <= high else ": too few dialogues to tell."
    if o["against"] == SFT:
        told[0] += " SFT saw the same dialogues, in the same order, for as many steps, from the same seed."
    else:
        told[0] += " Without that control, what plain fine-tuning on the same data gives is not known."
    groups = {word: names for word, names in o["categories"].items() if names}
    if groups:
        said = {"better": "better in", "worse": "worse in", "undecided": "undecided in", "unknown": "unknown in"}
        told.append(
            "By category it is "
            + "; ".join(f"{said[word]} {listed(names)}" for word, names in groups.items())
            + f". Each interval stands alone: of many, about {percent(1 - o['confidence'])} exclude 0 by chance."
            + _after_adjustment(o)
        )
    if o["best_target_bits_per_byte"] is not None and o["bits_per_byte"]["merged"] is not None:
        told.append(_merged_to_best(o))
    if o["excluded_dialogues"]:
        told.append(
            f"{plural(o['excluded_dialogues'], 'held-out dialogue')} did not fit every model's context and "
            f"{'is' if o['excluded_dialogues'] == 1 else 'are'} left out."
        )
    told += [f"{model(name)} is not scored: {why}." for name, why in o["not_scored"].items()]
    return told


def _merged_to_best(o: Json) -> str:
    """Say whether merging improved on the best of the targets; the best was picked on the same dialogues."""
    best, merged = o["best_target_bits_per_byte"], o["bits_per_byte"]["merged"]
    which = f"the best single target, {o['best_target'].removeprefix('target ')}"
    levels = f"{number(best)} bits per byte before, {number(merged)} after"
    pair = o["merged_to_best"]
    if pair is None or None in pair:
        gained = "Merging improved on" if merged < best else "Merging did not improve on"
        return f"{gained} {which}: {levels} (this run kept no interval for the pair)."
    value, low, high = pair
    gained = "improved on" if high < 0 else "lost against" if low > 0 else "shows no difference to"
    return (
        f"Merging {gained} {which}: {levels}, a difference of {signed(value)}, "
        f"{percent(o['confidence'])} interval {signed(low)} to {signed(high)}, paired."
    )


def _after_adjustment(o: Json) -> str:
    """Say which categories still differ when all of them, and all models, count as one family of tests."""
    p_holm = {group["name"]: group["models"]["merged"]["p_holm"] for group in o["groups"][1:]}
    if None in p_holm.values():
        return ""
    held = [name for name, p in p_holm.items() if p < 1 - o["confidence"]]
    return (
        f" After adjustment for that (Holm), {listed(held) or 'none'} still {'differs' if len(held) < 2 else 'differ'}."
    )


def _sources(s: Json) -> list[str]:
    told = []
    for name, source in s["by_source"].items():
        share = source["all"]["share"]
        line = (
            f"{name} predicts {percent(share)} of the rows better than the pivot: "
            f"{number(source['source_bits_per_byte'])} against {number(source['pivot_bits_per_byte'])} bits per byte "
            "on the dialogues fused on"
        )
        groups = [g for g in source["by_category"] if g["share"] is not None]
        if len(groups) > 1:
            best, worst = max(groups, key=lambda g: g["share"]), min(groups, key=lambda g: g["share"])
            if best["share"] - worst["share"] > _CLOSE:
                line += (
                    f"; most in {best['name']} ({percent(best['share'])}), least in {worst['name']} "
                    f"({percent(worst['share'])})"
                )
        differing = source["differing"]
        left_out = source["n_dialogues"] - source["compared"] - differing
        if differing:
            line += f"; {plural(differing, 'dialogue')} cannot be compared: its tokens there are not the pivot's"
        told.append(line + (f"; {plural(left_out, 'dialogue')} it could not encode." if left_out else "."))
    if s["select"] == "source":
        told.append("select: source was set, so every row of a source is taught whatever its cross-entropy.")
    return told


def _alignment(a: Json) -> list[str]:
    told = []
    for name, source in a["by_source"].items():
        rows, mass = source["rows"], source["mass"]
        none = rows["none"]
        told.append(
            f"{name}: {percent(None if none is None else 1 - none)} of the pivot's rows have a row of the source with "
            f"the same text before it ({percent(rows['same'])} with the same next token's end); of the probability "
            f"carried over, {percent(mass['exact'], 1)} is exact, {percent(mass['approximate'], 1)} approximate, "
            f"{percent(mass['lost'], 1)} lost."
        )
    if a["twins"]:
        needs = "needs" if len(a["twins"]) == 1 else "need"
        told.append(f"{listed(a['twins'])} {needs} none: the tokens are the pivot's, byte by byte.")
    return told


def _training(t: Json) -> list[str]:
    falls = [
        f"{model(name)} {number(target['first_loss'])} → {number(target['last_loss'])}"
        for name, target in t["by_target"].items()
    ]
    told = [f"Training loss, first to last: {'; '.join(falls)}."]
    told.append(
        "The targets' loss mixes hard and soft terms, SFT's is the hard term alone: compare a curve with itself, and "
        "the models by the table at the top."
    )
    return told


def _merge(m: Json) -> list[str]:
    told = [_chosen(m["sweep"])] if m["sweep"] else []
    weights = m["mean_weight"]
    if weights and None not in weights and len(weights) == len(m["targets"]) > 1:
        even = max(weights) - min(weights) < _CLOSE * len(weights) / 2
        shares = ", ".join(f"{name} {number(w, 3)}" for name, w in zip(m["targets"], weights, strict=True))
        told.append(f"{'The targets weigh nearly alike' if even else 'The targets differ in weight'}: {shares}.")
    kept = m["surviving_share"]
    if kept and None not in kept:
        told.append(
            f"Of each target's update (Σ δ²), {percent(min(kept))} to {percent(max(kept))} survives the merge."
            if len(kept) > 1
            else f"{percent(kept[0])} of the target's update (Σ δ²) survives the merge."
        )
    told += [f"Warning: {warning}." for warning in m["warnings"]]
    return told or [f"{m['method']} over {plural(m['n_tensors'], 'tensor')}; it keeps no further numbers."]


def _chosen(s: Json) -> str:
    """Say what the merge was chosen from, and how far behind the others were."""
    best, *others = s["merges"]
    told = (
        f"{best['label']} was chosen from {plural(len(s['merges']), 'merge')} by {number(best['bits_per_byte'][0])} "
        f"bits per byte on {plural(s['n_dialogues'], 'validation dialogue')}, neither trained nor tested on"
    )
    as_good = [merge["label"] for merge in others if merge["verdict"] != "worse"]
    if not others:
        return told + "."
    told += f"; {listed(as_good)} cannot be told from it" if as_good else "; every other is worse"
    last = others[-1]
    return told + f". The worst, {last['label']}, loses {number(last['difference'][0])}."


def _cost(c: Json) -> list[str]:
    by_kind: dict[str, float] = {}
    for stage in c["stages"]:
        kind = stage["name"].partition(" ")[0]
        by_kind[kind] = by_kind.get(kind, 0.0) + stage["seconds"]
    longest = max(by_kind, key=lambda kind: by_kind[kind])
    share = by_kind[longest] / c["seconds"] if c["seconds"] else None
    told = [
        f"The stages took {duration(c['seconds'])} ({duration(c['cpu_seconds'])} of CPU), {percent(share)} of it to "
        f"{longest}; at most {size(c['peak_memory_bytes'])} of memory"
        + (f" and {size(c['peak_device_bytes'])} on the device" if c["peak_device_bytes"] else "")
        + f"; {size(c['disk_bytes'])} on disk."
    ]
    if c["sft_seconds"]:
        times = number(c["fusion_seconds"] / c["sft_seconds"], 1)
        told.append(
            f"Extracting, aligning, training the targets and merging took {duration(c['fusion_seconds'])}, "
            f"{times} times the {duration(c['sft_seconds'])} of SFT alone."
        )
    if c["interrupted"]:
        told.append(
            f"{plural(c['interrupted'], 'attempt')} ended before its stage was done, or goes on: it is not in the sum."
        )
    return told


def _provenance(p: Json) -> list[str]:
    machines = [
        f"{e['processor']}, {plural(e['cores'], 'core')}, {listed(e['devices']) or 'no GPU'}" for e in p["environments"]
    ]
    return [f"Computed on {listed(list(dict.fromkeys(machines)))}."] if machines else ["The machine was not noted."]


_TELL: dict[str, Callable[[Any], list[str]]] = {
    "outcome": _outcome,
    "sources": _sources,
    "alignment": _alignment,
    "training": _training,
    "merge": _merge,
    "cost": _cost,
    "provenance": _provenance,
}
