"""Where each assistant turn of a dialogue stands in the text that a chat template makes of it.

The spans are found by rendering the dialogue twice, once as it is and once with a marker in the place of each assistant
turn. What stands around the markers is what the template adds; the first rendering must be exactly these pieces with
the turns' contents between them, so a content that occurs elsewhere in the text cannot be mistaken for the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusechat.records import Dialogue, Message
from fusechat.template import RenderError, Template, render


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Where one assistant turn stands, in characters of the rendered text.

    The content's characters are [start, end); `offset` of the original content's characters were trimmed before it.
    What the template writes to end the turn follows, up to `turn_end`.
    """

    start: int
    end: int
    turn_end: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A dialogue as text with one span per assistant message, in order."""

    text: str
    spans: tuple[Span, ...]


def render_dialogue(template: Template, tokenizer: Any, dialogue: Dialogue) -> Rendered:
    """Render a dialogue and find its assistant turns; running text is rendered as it stands.

    Raises RenderError when the template refuses the dialogue or the turns cannot be told apart from what it adds.
    """
    if dialogue.plain:
        text = dialogue.messages[0].content
        return Rendered(text=text, spans=(Span(start=0, end=len(text), turn_end=len(text), offset=0),))
    messages = dialogue.messages
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    text = render(template, tokenizer, messages)
    marks = _marks(len(turns), [message.content for message in messages])
    marked = list(messages)
    for i, mark in zip(turns, marks, strict=True):
        marked[i] = replace(messages[i], content=mark)
    pieces = _split_at(render(template, tokenizer, marked), marks)
    try:
        spans = _spans_between(pieces, [messages[i].content for i in turns], text)
        for n, i in enumerate(turns[:-1]):
            alone = render(template, tokenizer, marked[: i + 1]).rpartition(marks[n])[2]
            spans[n] = replace(spans[n], turn_end=spans[n].end + _common_length(alone, pieces[n + 1]))
    except RenderError as refusal:
        try:
            spans = _spans_by_prefixes(template, tokenizer, messages, turns, text, marks)
        except RenderError:
            raise refusal from None
    return Rendered(text=text, spans=tuple(spans))


def _parts(content: str) -> tuple[str, ...]:
    """Return what a template may write of a content: all of it, trimmed, or only what follows "</think>"."""
    answer = content.rpartition("</think>")[2]
    whole = (content, content.strip(), content.lstrip(), content.rstrip())
    return tuple(part for part in (*whole, answer, answer.lstrip("\n"), answer.strip()) if part)


def _common_length(alone: str, following: str) -> int:
    """Return how much of `following` ends the turn: what also follows its content when it is the last turn."""
    return next((i for i, (a, b) in enumerate(zip(alone, following)) if a != b), min(len(alone), len(following)))


def _spans_between(pieces: Sequence[str], contents: Sequence[str], text: str) -> list[Span]:
    """Return the spans that make `text` the pieces with a part of each content between them."""
    if not text.startswith(pieces[0]):
        raise RenderError("what the template writes around an assistant turn depends on its content")
    spans = []
    position = len(pieces[0])
    for n, content in enumerate(contents):
        after, is_last = pieces[n + 1], n + 1 == len(contents)
        for part in _parts(content):
            end = position + len(part)
            fits = text[end:] == after if is_last else text.startswith(after, end)
            if fits and text.startswith(part, position):
                break
        else:
            raise RenderError("the template changes the content of an assistant turn")
        spans.append(Span(start=position, end=end, turn_end=end + len(after), offset=content.rfind(part)))
        position = end + len(after)
    return spans


def _marks(count: int, contents: Sequence[str]) -> list[str]:
    """Return a distinct marker per turn from the private use area, found in none of the contents."""
    for code in range(0xE000, 0xF8FF):
        letter = chr(code)
        if not any(letter in content for content in contents):
            return [f"{letter}{n}{letter}" for n in range(count)]
    raise RenderError("it uses every character of the private use area")


def _split_at(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise RenderError("the template does not write each assistant turn once and in order")
        pieces.append(before)
    return [*pieces, text]


def _spans_by_prefixes(
    template: Template,
    tokenizer: Any,
    messages: Sequence[Message],
    turns: Sequence[int],
    text: str,
    marks: Sequence[str],
) -> list[Span]:
    """Find each turn behind the rendering of all that precedes it, for templates that look into the content.

    Reasoning models' templates take "<think>" apart and write it anew; the rendering with a marker then differs.
    """
    spans = []
    for i, mark in zip(turns, marks, strict=True):
        before = render(template, tokenizer, messages[:i], add_generation_prompt=True)
        start = len(before)
        part = next((part for part in _parts(messages[i].content) if text.startswith(part, start)), None)
        if part is None or not text.startswith(before):
            raise RenderError("the assistant's turn does not follow its prompt")
        end = start + len(part)
        marked = [*messages[:i], replace(messages[i], content=mark)]
        alone = render(template, tokenizer, marked).rpartition(mark)[2]
        turn_end = end + _common_length(alone, text[end:])
        spans.append(Span(start=start, end=end, turn_end=turn_end, offset=messages[i].content.rfind(part)))
    return spans
