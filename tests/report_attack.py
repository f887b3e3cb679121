"""The facts of a run whose every name and text is an attack on the page that shows them."""

from __future__ import annotations

import copy
from typing import Any

from fusechat.report.facts import SECTIONS

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u202e|`☠\u2028'\"{{7*7}}"


def hostile(value: Any, within: str = "") -> Any:
    """Put hostile text wherever a run's names and texts stand."""
    kept = {"same", "coarser", "finer", "none", "exact", "approximate", "lost", "overall", "merged", "sft", "pivot"}
    if isinstance(value, dict):
        named = within in ("by_source", "by_target", "models")
        return {hostile(key) if named else key: hostile(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    if isinstance(value, str) and value not in kept:
        return f"{HOSTILE}{value}"
    return value


def hostile_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a run whose every text is an attack, with a token of many characters."""
    changed = hostile(copy.deepcopy(facts))
    for section in SECTIONS:  # keys the code reads were never a run's to choose
        changed[section] |= {k: facts[section][k] for k in ("against", "verdict", "select") if k in facts[section]}
    segments = changed["alignment"]["by_source"][f"{HOSTILE}source"]["dialogues"][0]["segments"]
    segments[0]["pivot"][0]["text"] = "W" * 20_000
    return changed
