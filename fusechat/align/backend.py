"""The compiled engine, if it is there and wanted: the one place that decides.

FUSECHAT_NATIVE=auto (default) uses it when it was built, `require` makes its absence an error, `off` never uses it.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Protocol, cast

from fusechat.errors import ConfigError, NativeMissingError

VARIABLE = "FUSECHAT_NATIVE"


def native() -> ModuleType | None:
    """Return fusechat._native, or None where the fallback is to be used.

    Raises NativeMissingError when FUSECHAT_NATIVE=require and it was not built, ConfigError for another value.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "require", "off"):
        raise ConfigError(f"{VARIABLE}={choice!r} is not one of auto, require, off")
    if choice == "off":
        return None
    try:
        from fusechat import _native
    except ImportError as error:
        if choice == "require":
            raise NativeMissingError(
                f"{VARIABLE}=require, but the compiled engine cannot be imported ({error}): install the package, "
                "or build it in place with cmake"
            ) from error
        return None
    return _native


def live_backend() -> str:
    """Return which backend is live, `native` or `numba`, for reports."""
    return "numba" if native() is None else "native"


class Engine(Protocol):
    """What both backends do; fusechat/align/rows.py says what the arrays are."""

    def match_rows(self, pivot: Any, source: Any, partner: Any, threads: int) -> tuple[Any, ...]: ...

    def remap_rows(self, matched: Any, *args: Any) -> tuple[Any, ...]: ...

    def dtw(self, source_tokens: Any, pivot_tokens: Any, source_mark: str, pivot_mark: str) -> tuple[int, Any]: ...

    def nearest(self, patterns: list[str], texts: list[str], threads: int) -> tuple[Any, Any]: ...

    def edit_distances(self, a: list[str], b: list[str]) -> Any: ...


def engine() -> Engine:
    """Return the compiled engine, or the numba fallback with the same functions."""
    compiled = native()
    if compiled is not None:
        return cast(Engine, compiled)
    from fusechat.align import fallback

    return cast(Engine, fallback)
