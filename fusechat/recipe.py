"""Recipes that come with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from fusechat.errors import ConfigError

PREFIX = "recipe:"
_OTHERS = ("merge-", "accelerate-", "deepspeed-")


def recipe_path(config: str) -> Path:
    """Return the path of a YAML, or of the shipped recipe that `recipe:NAME` names.

    Raises ConfigError with the nearest name for a recipe that there is not.
    """
    if not config.startswith(PREFIX):
        return Path(config)
    name = config.removeprefix(PREFIX)
    folder = Path(__file__).parent / "recipes"
    known = sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith(_OTHERS))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"no recipe {name!r}: {hint}")
    return folder / f"{name}.yaml"
