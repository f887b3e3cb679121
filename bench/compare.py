"""Did anything get slower? Ratios of a new result against those of an old one.

    python bench/compare.py OLD.json NEW.json [--tolerance 0.3]

Ratios are compared across machines; absolute figures (tokens/s, MiB) only where both results name the same machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.bench.machine import machine_name


def worse(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> tuple[list[str], int]:
    """Return a line for every claim worse by more than `tolerance` (0.3 is 30 %), and how many were compared."""
    same_machine = machine_name(old["environment"]) == machine_name(new["environment"])
    before = {_key(claim): claim for claim in old["claims"]}
    lines, compared = [], 0
    for claim in new["claims"]:
        known = before.get(_key(claim))
        if known is None or not known["value"] or not claim["value"]:
            continue
        if claim["unit"] != "×" and not same_machine:
            continue
        compared += 1
        loss = known["value"] / claim["value"] if claim["higher_is_better"] else claim["value"] / known["value"]
        if loss > 1 + tolerance:
            lines.append(
                f"{claim['benchmark']}: {claim['name']} against {claim['against']} was {known['value']:.3g} "
                f"{claim['unit']} and is {claim['value']:.3g}: {loss - 1:.0%} worse, {tolerance:.0%} is allowed"
            )
    return lines, compared


def _key(claim: Mapping[str, Any]) -> tuple[str, str, str]:
    return claim["benchmark"], claim["name"], claim["against"]


def main() -> int:
    """Compare two files; exit 1 where something got worse, 2 where nothing could be compared."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("old", type=Path)
    options.add_argument("new", type=Path)
    options.add_argument("--tolerance", type=float, default=0.3)
    chosen = options.parse_args()
    lines, compared = worse(json.loads(chosen.old.read_text()), json.loads(chosen.new.read_text()), chosen.tolerance)
    print("\n".join(lines) or f"{compared} claims compared, none worse than {chosen.tolerance:.0%}")
    return 1 if lines else 0 if compared else 2


if __name__ == "__main__":
    sys.exit(main())
