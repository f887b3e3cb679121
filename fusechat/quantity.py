"""Quantities as people write and read them: sizes, numbers of three digits with a unit prefix, durations."""

from __future__ import annotations

import re

from fusechat.errors import ConfigError

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 100MB, 1.5GiB or 4096; raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is no size: write it like 100MB, 1.5GiB or 4096")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if not 1 <= size < 2**63:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise ConfigError(f"{shown!r} is no size: it must be above zero and below 8 EiB")
    return int(size)


def prefixed(value: float, unit: str = "", *, giga: str = "G") -> str:
    """Write a number with three digits and a prefix (1234 → 1.23k), and a unit behind a space.

    `giga` is what a billion is called: B for parameters.
    """
    space = " " * bool(unit)
    for limit, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * limit:  # what three digits round up to it
            return f"{value / limit:.3g}{space}{giga if prefix == 'G' else prefix}{unit}"
    return f"{value:.3g}{space}{unit}"


def human_bytes(size: float) -> str:
    """Write a number of bytes (1.23 kB)."""
    return prefixed(size, "B")


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
