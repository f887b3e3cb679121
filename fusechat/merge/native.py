"""The compiled engine, or one line that says how to get it."""

from __future__ import annotations

from fusechat.errors import NativeMissingError

try:
    from fusechat import _native
except ImportError as error:  # pragma: no cover
    raise NativeMissingError(
        "merging needs the compiled engine, which is not built in this copy: run pip install . (or make setup)"
    ) from error

__all__ = ["_native"]
