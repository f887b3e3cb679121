"""What of a dialogue can be learnt from: turns that answer something, answers that say something."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from fusechat.records import Message

EMPTY_ASSISTANT = "empty assistant turn, with the user turn it answers"
LEADING_ASSISTANT = "assistant turn before any user turn"
UNANSWERED_USER = "last user turn without an answer"
UNANSWERED_SYSTEM = "last system turn without an answer"
EMPTY_SYSTEM = "empty system turn"
NO_ASSISTANT = "dialogue without an answered user turn"
EMPTY_TEXT = "empty running text"

_SPACE_RUN = re.compile(r"\s+")


def clean_messages(messages: Sequence[Message], dropped: Counter[str]) -> tuple[Message, ...]:
    """Return the messages that are a target or lead to one, and count in `dropped` what goes and why.

    An empty answer goes together with its question, so that the roles still alternate; an assistant turn that comes
    before any user turn goes, for many templates refuse it; turns after the last answer go, for they predict nothing.
    Empty user turns stay: their answers are targets all the same.
    """
    kept: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if message.role == "system":
            if message.content.strip():
                waiting.append(message)
            else:
                dropped[EMPTY_SYSTEM] += 1
        elif message.role == "user":
            waiting.append(message)
        elif not any(m.role == "user" for m in (*kept, *waiting)):
            dropped[LEADING_ASSISTANT] += 1
        elif not message.content.strip():
            dropped[EMPTY_ASSISTANT] += 1
            waiting = [m for m in waiting if m.role == "system"]
        else:
            kept += [*waiting, message]
            waiting = []
    dropped[UNANSWERED_USER] += sum(m.role == "user" for m in waiting)
    dropped[UNANSWERED_SYSTEM] += sum(m.role == "system" for m in waiting)
    if not kept:
        dropped[NO_ASSISTANT] += 1
    return tuple(kept)


def cut_text(text: str, max_bytes: int | None) -> Iterator[str]:
    """Yield running text in pieces of at most `max_bytes` UTF-8 bytes, stripped of white space at both ends.

    A piece ends at the last white space that fits, or between two characters when there is none; a single character
    that is longer than `max_bytes` is a piece of its own. Nothing but white space is lost.
    """
    text = text.strip()
    if max_bytes is None or len(text.encode()) <= max_bytes:
        if text:
            yield text
        return
    start = 0
    while start < len(text):
        # A character has at least one byte, so no more than max_bytes characters need looking at.
        window = text[start : start + max_bytes + 1]
        fits = len(window.encode()[:max_bytes].decode(errors="ignore")) or 1
        end = start + fits
        if end < len(text):
            spaces = [m.start() for m in _SPACE_RUN.finditer(window[: fits + 1])]
            if spaces and spaces[-1] > 0:
                end = start + spaces[-1]
        yield text[start:end]
        start = end
        while start < len(text) and text[start].isspace():
            start += 1
