"""A parameter's value for one tensor: plain, by name (filters), or by depth (gradients), in mergekit's YAML form.

weight: 0.3                                   the same everywhere
weight: [0.0, 0.5, 1.0]                       interpolated from the first layer to the last
weight: [{filter: mlp, value: 0.1}, 0.3]      the first filter that occurs in the tensor's name; last, the rest
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusechat.errors import ConfigError

Scalar = bool | int | float | str
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One value, or a gradient of values, for the tensors whose name holds `pattern` (None: all)."""

    pattern: str | None
    values: tuple[Scalar, ...]

    def at(self, depth: float) -> Scalar:
        """Return the value at a depth from 0 (first layer) to 1 (last)."""
        if len(self.values) == 1:
            return self.values[0]
        numbers = [float(v) for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        place = depth * (len(self.values) - 1)
        if len(numbers) != len(self.values):
            return self.values[int(place)]
        low = int(place)
        high = min(low + 1, len(numbers) - 1)
        return (1 - (place - low)) * numbers[low] + (place - low) * numbers[high]


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter as it was written: rules in order of precedence."""

    rules: tuple[Rule, ...]

    def resolve(self, tensor: str, depth: float) -> Scalar | None:
        """Return the value for a tensor, None when no rule speaks of it."""
        for rule in self.rules:
            if rule.pattern is None or rule.pattern in tensor:
                return rule.at(depth)
        return None

    @property
    def plain(self) -> bool:
        """Whether it is one value, the same everywhere."""
        return len(self.rules) == 1 and self.rules[0].pattern is None and len(self.rules[0].values) == 1

    def patterns(self) -> Iterator[str]:
        """Yield every filter."""
        return (rule.pattern for rule in self.rules if rule.pattern is not None)


def parse_setting(raw: Any, where: str) -> Setting:
    """Read a parameter's YAML; raises ConfigError naming `where`."""
    if isinstance(raw, Mapping):
        return Setting((_parse_rule(raw, where),))
    if isinstance(raw, list):
        if not raw:
            raise ConfigError(f"{where} is an empty list: give a value")
        if any(isinstance(item, Mapping) for item in raw):
            return Setting(tuple(_parse_rule(item, where) for item in raw))
        return Setting((Rule(pattern=None, values=tuple(_parse_scalar(item, where) for item in raw)),))
    return Setting((Rule(pattern=None, values=(_parse_scalar(raw, where),)),))


def _parse_rule(raw: Any, where: str) -> Rule:
    if not isinstance(raw, Mapping):
        values = raw if isinstance(raw, list) else [raw]
        return Rule(pattern=None, values=tuple(_parse_scalar(v, where) for v in values))
    unknown = sorted(str(key) for key in raw.keys() - {"filter", "value"})
    if unknown or "value" not in raw:
        raise ConfigError(f"{where}: a filtered value has the keys filter and value, found {sorted(map(str, raw))}")
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise ConfigError(f"{where}: filter must be a part of a tensor's name, found {pattern!r}")
    values = raw["value"] if isinstance(raw["value"], list) else [raw["value"]]
    if not values:
        raise ConfigError(f"{where} has an empty list of values: give a value")
    return Rule(
        pattern=None if pattern == "*" else pattern, values=tuple(_parse_scalar(value, where) for value in values)
    )


def _parse_scalar(raw: Any, where: str) -> Scalar:
    if isinstance(raw, str):
        # In a mapping that PyYAML has read, 1e-3 (no dot) is text.
        try:
            return float(raw)
        except ValueError:
            return raw
    if isinstance(raw, bool | int | float):
        return raw
    raise ConfigError(f"{where} must be a number, a word, or a list of them, found {raw!r}")


def layer_of(tensor: str) -> int | None:
    """Return the index of the layer a tensor belongs to, None for embeddings, final norm and head."""
    match = _LAYER.search(tensor)
    return int(match.group(1)) if match else None


def depth_of(tensor: str, n_layers: int) -> float:
    """Return a tensor's depth from 0 to 1; what belongs to no layer counts as the first."""
    layer = layer_of(tensor)
    if layer is None:
        return 0.0
    return layer / (n_layers - 1) if n_layers > 1 else 1.0
