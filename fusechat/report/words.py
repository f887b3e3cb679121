"""Numbers as a person reads them; what is not known, or was NaN, is n/a."""

from __future__ import annotations

from fusechat import quantity
from fusechat.layout import SFT

UNKNOWN = "n/a"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with fixed decimals and a real minus sign."""
    return UNKNOWN if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Write a difference with its sign."""
    return UNKNOWN if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 0) -> str:
    """Write a share in percent, never rounded to a 0 or 100 that it is not."""
    if share is None:
        return UNKNOWN
    if 0 < share < 0.5 * 10 ** -(digits + 2):
        return f"<{10**-digits:.{digits}f} %"
    if 1 - 0.5 * 10 ** -(digits + 2) < share < 1:
        return f">{100 - 10**-digits:.{digits}f} %"
    return f"{share:.{digits}%}".replace("%", " %")


def count(value: float | None) -> str:
    """Write a whole number with its thousands apart."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """Write a number with three digits and a unit prefix (1234 → 1.23k)."""
    return UNKNOWN if value is None else quantity.prefixed(value)


def size(value_bytes: float | None) -> str:
    """Write a number of bytes."""
    return UNKNOWN if value_bytes is None else quantity.human_bytes(value_bytes)


def duration(seconds: float | None) -> str:
    """Write a time in its two largest units."""
    return UNKNOWN if seconds is None else quantity.duration(seconds)


def rate(per_second: float | None, unit: str) -> str:
    """Write how many of a unit a second, or where that is less than one, how long each took."""
    if not per_second:
        return UNKNOWN
    if per_second < 1:
        return f"{duration(1 / per_second)} a {unit.removesuffix('s')}"
    return f"{short(per_second)} {unit}/s"


def probability(p: float) -> str:
    """Write a p-value with its relation."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def plural(n: int, thing: str, things: str | None = None) -> str:
    """Write a count with its noun."""
    return f"{n:,} {thing if n == 1 else things or thing + 's'}"


def listed(names: list[str], most: int = 6) -> str:
    """Join names as a sentence does, and say how many were left out."""
    shown = names[:most]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def model(name: str) -> str:
    """Write a model's name as a person does."""
    return "SFT" if name == SFT else name
