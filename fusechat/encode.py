"""Dialogues in one model's tokens: which tokens are the assistant's, and where each ends in its message.

The rendered text is tokenised once, as a whole. Which token belongs to which turn follows from byte offsets, never
from tokenising pieces, which would split words that the template's text and the content share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.bytetable import ByteTable, Role, token_byte_ends
from fusechat.errors import DataError
from fusechat.records import Dialogue, Encoded
from fusechat.spans import Rendered, render_dialogue
from fusechat.template import RenderError, Template

_BATCH_DIALOGUES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A dialogue that has no encoding, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSet:
    """A data set in one model's tokens.

    `index` holds the place of each encoding's dialogue in the data set, ascending; `skipped` the reason of every other;
    `cut_turns` how many assistant turns were cut from the end of an over-long dialogue.
    """

    index: list[int] = field(default_factory=list)
    encoded: list[Encoded] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    cut_turns: dict[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = Counter(self.skipped.values())
        skips = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(8)) or "none"
        return (
            f"{len(self.encoded)} dialogues, {sum(len(e.input_ids) for e in self.encoded)} tokens, "
            f"{sum(int(e.loss_mask.sum()) for e in self.encoded)} the assistant's; "
            f"{sum(self.cut_turns.values())} turns cut from {len(self.cut_turns)} over-long dialogues; skipped: {skips}"
        )


def encode_all(
    dialogues: Sequence[Dialogue],
    tokenizer: Any,
    table: ByteTable,
    *,
    template: Template,
    max_length_tokens: int | None,
) -> EncodedSet:
    """Encode a data set, dialogue by dialogue in the order given.

    A dialogue longer than `max_length_tokens` loses whole turns from its end; one of which no assistant turn fits, that
    the template refuses, or whose text the tokenizer cannot spell is skipped. Raises DataError when a chat has no
    template to be rendered with, and when every dialogue is skipped.
    """
    result = encode_set(dialogues, tokenizer, table, template=template, max_length_tokens=max_length_tokens)
    if not result.encoded:
        raise DataError(f"no dialogue can be encoded with the template {template.name}: {result}")
    return result


def encode_set(
    dialogues: Sequence[Dialogue],
    tokenizer: Any,
    table: ByteTable,
    *,
    template: Template,
    max_length_tokens: int | None,
) -> EncodedSet:
    """Encode dialogues as `encode_all` does, of which it may well be that all are skipped."""
    done: dict[int, Encoded] = {}
    skipped: dict[int, str] = {}
    cut_turns: dict[int, int] = {}
    waiting = dict(enumerate(dialogues))
    while waiting:
        shorter: dict[int, Dialogue] = {}
        places = list(waiting)
        for first in range(0, len(places), _BATCH_DIALOGUES):
            batch = {place: waiting[place] for place in places[first : first + _BATCH_DIALOGUES]}
            for place, encoded in _encode_batch(batch, tokenizer, table, template).items():
                if isinstance(encoded, Skipped):
                    skipped[place] = encoded.reason
                elif max_length_tokens is None or len(encoded.input_ids) <= max_length_tokens:
                    done[place] = encoded
                else:
                    cut = _cut(waiting[place], encoded, max_length_tokens)
                    if isinstance(cut, Skipped):
                        skipped[place] = cut.reason
                    else:
                        shorter[place] = cut
                        cut_turns[place] = _turns(dialogues[place]) - _turns(cut)
        waiting = shorter
    index = sorted(done)
    return EncodedSet(
        index=index,
        encoded=[done[place] for place in index],
        skipped=dict(sorted(skipped.items())),
        cut_turns={place: count for place, count in sorted(cut_turns.items()) if place in done},
    )


def _turns(dialogue: Dialogue) -> int:
    return sum(message.role == "assistant" for message in dialogue.messages)


def _cut(dialogue: Dialogue, encoded: Encoded, max_length_tokens: int) -> Dialogue | Skipped:
    """Return the dialogue up to the last assistant turn that fits, at least one turn shorter."""
    if dialogue.plain:
        return Skipped(reason=f"running text longer than {max_length_tokens} tokens: set max_bytes to have it cut")
    # The first turn with a token beyond the limit does not fit; the last turn always has one, for nothing follows it.
    beyond = encoded.turn[max_length_tokens:]
    fits = int(beyond[beyond >= 0].min()) - 1
    if fits < 0:
        return Skipped(reason=f"no assistant turn ends within {max_length_tokens} tokens: raise max_length_tokens")
    ends = [i for i, message in enumerate(dialogue.messages) if message.role == "assistant"]
    return replace(dialogue, messages=dialogue.messages[: ends[fits] + 1])


def _encode_batch(
    dialogues: dict[int, Dialogue], tokenizer: Any, table: ByteTable, template: Template
) -> dict[int, Encoded | Skipped]:
    out: dict[int, Encoded | Skipped] = {}
    rendered: dict[int, Rendered] = {}
    for place, dialogue in dialogues.items():
        try:
            rendered[place] = render_dialogue(template, tokenizer, dialogue)
        except RenderError as error:
            out[place] = Skipped(reason=str(error))
    if not rendered:
        return out
    texts = [r.text for r in rendered.values()]
    tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    for (place, text), ids in zip(rendered.items(), tokens, strict=True):
        try:
            out[place] = _label(dialogues[place], text, np.asarray(ids, np.int32), tokenizer, table)
        except DataError as error:
            out[place] = Skipped(reason=f"cannot be encoded: {error}")
    return out


def _label(
    dialogue: Dialogue, rendered: Rendered, ids: npt.NDArray[np.int32], tokenizer: Any, table: ByteTable
) -> Encoded:
    """Return the encoding of a rendered dialogue from its tokens."""
    ends = token_byte_ends(table, ids, rendered.text.encode())
    if dialogue.plain:
        ids, ends = _as_document(ids, ends, tokenizer, goes_on=dialogue.goes_on)
    starts = np.concatenate([[0], ends[:-1]])
    special = table.roles[ids] != Role.TEXT
    turn = np.full(len(ids), -1, np.int32)
    byte_end = np.full(len(ids), -1, np.int32)
    contents = [message.content for message in dialogue.messages if message.role == "assistant"]
    at_byte = _byte_offsets(rendered.text, [p for s in rendered.spans for p in (s.start, s.end, s.turn_end)])
    for n, (span, content) in enumerate(zip(rendered.spans, contents, strict=True)):
        start, end = at_byte[span.start], at_byte[span.end]
        first, after = _content_range(starts, ends, special, start, end)
        stop = _turn_stop(starts, ends, special, after, at_byte[span.turn_end])
        trimmed = len(content[: span.offset].encode())
        turn[first:stop] = n
        byte_end[first:after] = np.minimum(ends[first:after], end) - start + trimmed
        byte_end[after:stop] = byte_end[after - 1] if after > first else 0  # what ends a turn has no width
    if not (turn >= 0).any():
        raise DataError("no token of it is the assistant's")
    # What follows the last assistant token predicts nothing.
    used = int(np.flatnonzero(turn >= 0)[-1]) + 1
    turn = turn[:used]
    return Encoded(input_ids=ids[:used], loss_mask=turn >= 0, turn=turn, byte_end=byte_end[:used])


def _as_document(
    ids: npt.NDArray[np.int32], ends: npt.NDArray[np.int64], tokenizer: Any, *, goes_on: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Put BOS before running text and EOS behind it, without width, where the tokenizer has them.

    Without a BOS an EOS stands in front, as between documents: else nothing would predict the first token, and a model
    without BOS would have it for nothing. Behind a piece whose document goes on there is no EOS to learn.
    """
    front = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if front is not None:
        ids, ends = np.insert(ids, 0, front), np.insert(ends, 0, 0)
    if tokenizer.eos_token_id is not None and not goes_on:
        ids, ends = np.append(ids, np.int32(tokenizer.eos_token_id)), np.append(ends, ends[-1:])
    return ids, ends


def _byte_offsets(text: str, characters: Sequence[int]) -> dict[int, int]:
    """Return the byte offset of each of some character offsets."""
    out, last, last_byte = {}, 0, 0
    for character in sorted(characters):
        last_byte += len(text[last:character].encode())
        last = character
        out[character] = last_byte
    return out


def _content_range(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], special: npt.NDArray[np.bool_], start: int, end: int
) -> tuple[int, int]:
    """Return the range of tokens that hold any of the content's bytes [start, end)."""
    first = int(np.searchsorted(ends, start, side="right"))
    # A SentencePiece dummy space has no width; the model writes it all the same.
    while first > 0 and starts[first - 1] == start and not special[first - 1]:
        first -= 1
    # A special token of the header that swallows white space may reach into the content.
    if first < len(ends) and special[first] and starts[first] < start:
        first += 1
    after = max(first, int(np.searchsorted(starts, end, side="left")))
    # And so may the special token that ends the turn.
    if after > first and special[after - 1] and ends[after - 1] > end:
        after -= 1
    return first, after


def _turn_stop(
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    special: npt.NDArray[np.bool_],
    after: int,
    turn_end: int,
) -> int:
    """Return where a turn stops whose content stops at `after`: behind its first special token, or with its text."""
    candidates = np.flatnonzero(special[after : int(np.searchsorted(starts, turn_end, side="left"))])
    if len(candidates):
        return after + int(candidates[0]) + 1
    return max(after, int(np.searchsorted(ends, turn_end, side="right")))
