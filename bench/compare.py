"""Did anything get slower? Ratios of a new result against those of an old one.

    python bench/compare.py OLD NEW.json [--tolerance 0.3]

Ratios are compared across machines; absolute figures (tokens/s, MiB) only where both results name the same machine.
Ratios to another's code depend on the instructions a processor has (torch's products with AMX, our loops with AVX-512):
OLD may be a folder of one result for each, named as bench/machine.py's instruction_set() says, x86-64-v3.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.bench.machine import LEVELS, instruction_set, machine_name
from fusechat.errors import DataError


def read_old(path: Path, level: str) -> dict[str, Any]:
    """Read a result; of a folder the one for an instruction set or else the nearest below it.

    Raises DataError where there is none, and for a file that is no result.
    """
    file = path
    if path.is_dir():
        below = list(LEVELS)[list(LEVELS).index(level) :] if level in LEVELS else [level]
        files = [path / f"{name}.json" for name in below]
        file = next((file for file in files if file.exists()), files[0])
        if not file.exists():
            raise DataError(f"{path}: no result of {level}; record one with fusechat bench … --json {file}")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = found["environment"], found["claims"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a benchmark's result ({error})") from error
    return found


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
    lines, compared = worse(
        read_old(chosen.old, instruction_set()), json.loads(chosen.new.read_text()), chosen.tolerance
    )
    print("\n".join(lines) or f"{compared} claims compared, none worse than {chosen.tolerance:.0%}")
    return 1 if lines else 0 if compared else 2


if __name__ == "__main__":
    sys.exit(main())
