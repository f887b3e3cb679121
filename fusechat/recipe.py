"""Recipes that come with the package, by name."""

from __future__ import annotations

import itertools
from pathlib import Path

from fusechat.errors import ConfigError, nearest

PREFIX = "recipe:"
FOLDER = Path(__file__).parent / "recipes"
_MERGES = "merge-"
_OTHERS = (_MERGES, "accelerate-")


def recipes() -> dict[str, Path]:
    """Return all recipes by name: of runs, of merges (merge-…) and of accelerate launch (accelerate-…)."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def purpose(recipe: Path) -> str:
    """Return what a recipe says of itself first: its comment down to the first line without text."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return " ".join(line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines))


def is_recipe(config: Path | str) -> bool:
    """Return whether a configuration is named as a recipe."""
    return str(config).startswith(PREFIX)


def recipe_path(config: Path | str, *, merge: bool = False) -> Path:
    """Return the path of a YAML, or of the shipped recipe of a run, or of a merge, that `recipe:NAME` names.

    Raises ConfigError with the nearest name for a recipe that there is not.
    """
    if not is_recipe(config):
        return Path(config)
    known = {name: path for name, path in recipes().items() if name.startswith(_MERGES if merge else _OTHERS) == merge}
    return find_recipe(str(config).removeprefix(PREFIX), known)


def find_recipe(name: str, known: dict[str, Path]) -> Path:
    """Return one of the known recipes by its name; raises ConfigError with the nearest name when it is none of them."""
    if name not in known:
        raise ConfigError(f"no recipe {name!r}{nearest(name, known)}")
    return known[name]
