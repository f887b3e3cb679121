"""Dialogues from files: reading, identity, and the split into a set to fit and a held-out set.

Reads ShareGPT (`conversations`), OpenAI `messages`, alpaca and running text, from json, jsonl, parquet and text files
and from data sets of the Hugging Face hub. Nothing is dropped silently: the report counts what went and why.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusechat.artifact import Json, sha256_bytes, sha256_json
from fusechat.data.cleaning import EMPTY_TEXT, clean_messages, cut_text
from fusechat.data.files import Located, is_text_file, read_items, read_text
from fusechat.data.formats import FORMATS, Format, category_of, detect_format, messages_of
from fusechat.errors import ConfigError, DataError
from fusechat.records import Dialogue, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What reading a data set gave: counts, and for everything dropped how often and why."""

    source: str
    format: str
    items: int
    dialogues: int
    assistant_turns: int
    dropped: dict[str, int]

    def __str__(self) -> str:
        losses = "; ".join(f"{count} × {reason}" for reason, count in self.dropped.items()) or "nothing"
        return (
            f"{self.source} ({self.format}): {self.items} items, {self.dialogues} dialogues, "
            f"{self.assistant_turns} assistant turns; dropped: {losses}"
        )


def load_dialogues(
    data: str | Path | Iterable[Json],
    *,
    format: Format = "auto",
    separator: str | Sequence[str] | None = None,
    max_bytes: int | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[Dialogue]:
    """Return a data set's dialogues; `read_dialogues` returns the report as well and explains the arguments."""
    return read_dialogues(data, format=format, separator=separator, max_bytes=max_bytes, split=split, limit=limit)[0]


def read_dialogues(
    data: str | Path | Iterable[Json],
    *,
    format: Format = "auto",
    separator: str | Sequence[str] | None = None,
    max_bytes: int | None = None,
    split: str = "train",
    limit: int | None = None,
) -> tuple[list[Dialogue], LoadReport]:
    """Read a data set and return its dialogues, cleaned (`clean_messages`), with the report.

    `data` is a file, a hub id, or the items themselves: a list of `{"messages": [...]}`, a `datasets.Dataset`.
    A text file is running text: one document, or several between separators. Running text longer than `max_bytes`
    UTF-8 bytes becomes several dialogues, cut at white space. `split` matters to hub ids only. `limit` stops after so
    many dialogues. Raises DataError when the data cannot be read, naming the place and the mend.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown data format {format!r}, known are {', '.join(FORMATS)}")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes is {max_bytes}, expected at least 1")
    items = _items(data, separator=separator, split=split)
    dialogues: list[Dialogue] = []
    dropped: Counter[str] = Counter()
    count = 0
    name = str(format)
    for where, item in items:
        if limit is not None and len(dialogues) >= limit:
            break
        count += 1
        name = detect_format(item, where) if format == "auto" else format
        messages = messages_of(item, format=name, where=where)
        category = category_of(item, where)
        if name == "text":
            pieces = list(cut_text(messages[0].content, max_bytes))
            dropped[EMPTY_TEXT] += not pieces
            dialogues += [_plain(piece, category, goes_on=n < len(pieces)) for n, piece in enumerate(pieces, 1)]
        elif kept := clean_messages(messages, dropped):
            dialogues.append(Dialogue(messages=kept, category=category))
    dialogues = dialogues[:limit]
    report = LoadReport(
        source=str(data) if isinstance(data, str | Path) else "the items given",
        format=name,
        items=count,
        dialogues=len(dialogues),
        assistant_turns=sum(m.role == "assistant" for d in dialogues for m in d.messages),
        dropped={reason: n for reason, n in dropped.items() if n},
    )
    if not dialogues:
        raise DataError(f"no dialogue to learn from: {report}")
    return dialogues, report


def _items(
    data: str | Path | Iterable[Json], *, separator: str | Sequence[str] | None, split: str
) -> Iterator[Located]:
    if not isinstance(data, str | Path):
        if separator is not None:
            raise ConfigError("a separator is for text files, these are items: remove it")
        yield from ((f"item {number}", item) for number, item in enumerate(data, 1))
        return
    path = Path(data)
    if not (path.is_file() and is_text_file(path)):
        if separator is not None:
            raise ConfigError(f"a separator is for text files, {data} is none: remove it")
        yield from read_items(data, split=split)
        return
    separators = [separator] if isinstance(separator, str) else list(separator or [])
    if "" in separators:
        raise ConfigError("the separator is empty: give the text that stands between documents, or none")
    text = read_text(path)
    documents = re.split("|".join(map(re.escape, separators)), text) if separators else [text]
    for number, document in enumerate(documents, 1):
        if document.strip() or len(documents) == 1:  # nothing stands between two separators, or after the last
            yield f"{path} document {number}", {"text": document}


def _plain(text: str, category: str, *, goes_on: bool) -> Dialogue:
    return Dialogue(messages=(Message(role="assistant", content=text),), category=category, plain=True, goes_on=goes_on)


def dialogue_key(dialogue: Dialogue) -> str:
    """Return the SHA-256 of what a dialogue says, its messages in canonical JSON: copies have the same.

    Neither the category is part of it, nor whether its document goes on.
    """
    return sha256_json(_said(dialogue))


def _said(dialogue: Dialogue) -> Json:
    return {"messages": [[message.role, message.content] for message in dialogue.messages], "plain": dialogue.plain}


def check_dialogues(dialogues: Sequence[Dialogue]) -> None:
    """Raise DataError for what is no sequence of at least one dialogue: a path or rows of a file, say, not read yet."""
    found: object = dialogues if isinstance(dialogues, str | Path) else next(iter(dialogues), None)
    if found is None:
        raise DataError("there is no dialogue: give at least one")
    if not isinstance(found, Dialogue):
        raise DataError(
            f"expected dialogues, got {type(found).__name__}: fusechat.dialogue.load_dialogues(...) reads a file, a "
            "hub id or a list of items"
        )


def dataset_fingerprint(dialogues: Sequence[Dialogue]) -> str:
    """Return the SHA-256 over what is encoded, in order, for stores know a dialogue by its place in the data set."""
    encoded = [_said(dialogue) | ({"goes_on": True} if dialogue.goes_on else {}) for dialogue in dialogues]
    return sha256_bytes("\n".join(map(sha256_json, encoded)).encode())


def split_held_out(
    dialogues: Sequence[Dialogue], fraction_or_count: float, seed: int
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Split into (fit, held out) by a hash of seed and content, each part in the order given.

    A float below 1 is a fraction, an integer a count. Copies of a dialogue fall on the same side, so the held-out part
    may be larger than asked by the copies of one dialogue. Raises ConfigError when either part would be empty.
    """
    count = round(fraction_or_count * len(dialogues)) if isinstance(fraction_or_count, float) else fraction_or_count
    if not 0 < count < len(dialogues):
        raise ConfigError(f"cannot hold out {fraction_or_count} of {len(dialogues)} dialogues: both parts need one")
    keys = [dialogue_key(dialogue) for dialogue in dialogues]
    copies = Counter(keys)
    chosen: set[str] = set()
    held = 0
    for key in sorted(copies, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest()):
        if held >= count:
            break
        chosen.add(key)
        held += copies[key]
    if held == len(dialogues):
        raise ConfigError(
            f"cannot hold out {fraction_or_count}: the {held} dialogues are copies of too few different ones"
        )
    fit = [dialogue for dialogue, key in zip(dialogues, keys, strict=True) if key not in chosen]
    return fit, [dialogue for dialogue, key in zip(dialogues, keys, strict=True) if key in chosen]
