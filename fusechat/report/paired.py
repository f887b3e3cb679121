"""Runs compared dialogue by dialogue, where they were scored on the same ones."""

from __future__ import annotations

from fusechat.artifact import Json, read_json
from fusechat.errors import FormatError
from fusechat.evaluate.bootstrap import comparison_table
from fusechat.evaluate.bpb import SCORES_FORMAT, Scores, bits_per_byte, category_groups, common_dialogues
from fusechat.layout import Layout
from fusechat.report.outcome import verdict
from fusechat.report.words import listed, number, percent, plural, probability, signed

_BOOTSTRAP: Json = {"samples": 2000, "confidence": 0.95, "seed": 0}


def kept_scores(layout: Layout) -> Json | None:
    """Return the scores a run kept of its held-out dialogues (scores.json); None for a run of before there were any."""
    path = layout.scores
    if not path.exists():
        return None
    kept = read_json(path)
    if not isinstance(kept, dict) or kept.get("format") != SCORES_FORMAT:
        raise FormatError(f"{path} does not hold the scores of a run: remove {layout.results} and run again")
    return dict(kept)


def paired_runs(kept: dict[str, Json | None]) -> Json | None:
    """Return the differences of the merged models to the best of them, dialogue by dialogue, in all and by category.

    Runs without scores are left out; None unless two are left, of the same held-out dialogues.
    """
    known = {name: one for name, one in kept.items() if one is not None}
    if len(known) < 2 or len({one["held_out_fingerprint"] for one in known.values()}) > 1:
        return None
    scores = {name: Scores.of(one["nll"]["merged"], one["content_bytes"]) for name, one in known.items()}
    members = common_dialogues(scores)
    categories = next(iter(known.values()))["categories"]
    against = min(scores, key=lambda name: scores[name].nll[members].sum())
    table = comparison_table(
        {
            group: {name: bits_per_byte(one).of(chosen) for name, one in scores.items()}
            for group, chosen in category_groups(members, categories).items()
        },
        value_name="bits_per_byte",
        against=against,
        **_BOOTSTRAP,
    )
    return {
        "against": against,
        "n_dialogues": len(members),
        "confidence": _BOOTSTRAP["confidence"],
        "groups": {
            group: {
                name: {
                    "bits_per_byte": cell["bits_per_byte"],
                    "difference": cell[f"difference_to_{against}"],
                    "verdict": verdict(cell[f"difference_to_{against}"], cell["p_holm"], _BOOTSTRAP["confidence"]),
                    "p_holm": cell["p_holm"],
                }
                for name, cell in by_run.items()
            }
            for group, by_run in table.items()
        },
    }


def headline(paired: Json | None) -> str:
    """Return the one answer on top of the comparison."""
    if paired is None:
        return "These runs cannot be paired"
    others = [name for name in paired["groups"]["overall"] if name != paired["against"]]
    as_good = [name for name in others if paired["groups"]["overall"][name]["verdict"] != "worse"]
    if not as_good:
        return f"{paired['against']} has the best merged model"
    return f"{paired['against']} leads, and {listed(as_good)} cannot be told from it"


def conclude_paired(paired: Json | None) -> list[str]:
    """Say how good the best run is and how far the others are behind."""
    if paired is None:
        return ["Not all were scored on the same held-out dialogues, or a run of an earlier version kept no scores."]
    overall = paired["groups"]["overall"]
    told = [
        f"{paired['against']} is at {number(overall[paired['against']]['bits_per_byte'][0])} bits "
        f"per byte, over {plural(paired['n_dialogues'], 'held-out dialogue')} that all were scored on."
    ]
    for name, cell in overall.items():
        if name != paired["against"]:
            value, low, high = cell["difference"]
            told.append(
                f"{name} {'is behind' if cell['verdict'] == 'worse' else 'cannot be told from it'}: {signed(value)}, "
                f"{percent(paired['confidence'])} interval {signed(low)} to {signed(high)}, "
                f"p {probability(cell['p_holm'])} (permutation test, adjusted for the number of runs)."
            )
    return told
