"""Sizes as people write them."""

from __future__ import annotations

import re

from fusechat.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 100MB, 1.5GiB or 4096; raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is no size: write it like 100MB, 1.5GiB or 4096")
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if size < 1:
        raise ConfigError(f"{text!r} is no size: it must be above zero")
    return size


def human_bytes(size: float) -> str:
    """Write a number of bytes with three digits."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size:.0f} B"
