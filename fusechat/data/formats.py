"""One item of a known layout to messages: ShareGPT, OpenAI messages, alpaca, running text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from fusechat.errors import DataError
from fusechat.records import Message, RoleName

Format = Literal["auto", "sharegpt", "messages", "alpaca", "text"]
FORMATS: tuple[str, ...] = get_args(Format)

ROLES: dict[str, RoleName] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
}

# The column each format is known by, in the order they are looked for.
_COLUMN_OF = {"sharegpt": "conversations", "messages": "messages", "alpaca": "instruction", "text": "text"}


def detect_format(item: Any, where: str) -> str:
    """Return the format whose column the item has; raises DataError naming the columns found."""
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is a {type(item).__name__}, expected an object with one of {_known_columns()}")
    for name, column in _COLUMN_OF.items():
        if column in item:
            return name
    raise DataError(f"{where} has the columns {sorted(map(str, item))}, expected one of {_known_columns()}")


def _known_columns() -> str:
    return ", ".join(f"'{column}' ({name})" for name, column in _COLUMN_OF.items())


def messages_of(item: Any, *, format: str, where: str) -> list[Message]:
    """Return an item's messages as they stand, running text as one assistant message; raises DataError."""
    column = _COLUMN_OF[format]
    if not isinstance(item, Mapping) or column not in item:
        found = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise DataError(f"{where} has no '{column}', which {format} needs (found: {found}): check the format")
    return _READERS[format](item, where)


def category_of(item: Mapping[str, Any], where: str) -> str:
    """Return the item's category (or topic), the empty string if it has none; raises DataError for half a character."""
    return _text(str(item.get("category") or item.get("topic") or ""), f"{where} category")


def _turns(item: Mapping[str, Any], column: str, where: str) -> list[Message]:
    turns = item[column]
    if not isinstance(turns, list):
        raise DataError(f"{where}: '{column}' is a {type(turns).__name__}, expected a list of turns")
    messages = []
    # LLaMA-Factory puts the system prompt beside the turns.
    if (system := _text(item.get("system"), f"{where} 'system'")).strip():
        messages.append(Message(role="system", content=system))
    for number, turn in enumerate(turns, 1):
        place = f"{where} turn {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place} is a {type(turn).__name__}, expected an object with a role and a content")
        role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
        if role_key not in turn or content_key not in turn:
            raise DataError(f"{place} has the keys {sorted(map(str, turn))}, expected from/value or role/content")
        messages.append(Message(role=_role(turn[role_key], place), content=_text(turn[content_key], place)))
    return messages


def _role(name: Any, place: str) -> RoleName:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{place} has the unknown role {name!r}, known are {', '.join(ROLES)}: rename or remove it")
    return role


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", part.get("value", ""))) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{place} has a content of type {type(content).__name__}, expected text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has half a surrogate pair at character {error.start}: repair the text") from error
    return content


def _alpaca(item: Mapping[str, Any], where: str) -> list[Message]:
    if "output" not in item:
        raise DataError(f"{where} has the columns {sorted(map(str, item))}, alpaca needs 'instruction' and 'output'")
    parts = [_text(item.get(key), f"{where} '{key}'") for key in ("system", "instruction", "input", "output")]
    system, instruction, extra, output = parts
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    head = [Message(role="system", content=system)] if system else []
    return [*head, Message(role="user", content=question), Message(role="assistant", content=output)]


def _plain(item: Mapping[str, Any], where: str) -> list[Message]:
    return [Message(role="assistant", content=_text(item["text"], f"{where} 'text'"))]


_READERS: dict[str, Callable[[Mapping[str, Any], str], list[Message]]] = {
    "sharegpt": lambda item, where: _turns(item, "conversations", where),
    "messages": lambda item, where: _turns(item, "messages", where),
    "alpaca": _alpaca,
    "text": _plain,
}
