"""What a server's reply says, for messages: one short line, without the key that some servers repeat."""

from __future__ import annotations

import json

import requests

_LONGEST = 300


def reply_text(reply: requests.Response, api_key: str | None) -> str:
    """Return the reply's error message, or all it says where it is no JSON of OpenAI's form, shortened."""
    text = reply.text
    try:
        value = json.loads(text)
        error = (value.get("error") or value) if isinstance(value, dict) else value
        text = str((error.get("message") or error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        pass
    if api_key:
        text = text.replace(api_key, "…")
    text = " ".join(text.split())
    return (text if len(text) <= _LONGEST else text[:_LONGEST] + "…") or "an empty reply"
