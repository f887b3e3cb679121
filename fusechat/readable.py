"""Text of strangers as a person can read it: what cannot be shown is escaped."""

from __future__ import annotations


def readable(text: str) -> str:
    """Return a text with every character that cannot be printed as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def decoded(token: bytes) -> str:
    """Return a token's bytes as text, those that are no UTF-8 as escapes."""
    return token.decode("utf-8", errors="backslashreplace")
