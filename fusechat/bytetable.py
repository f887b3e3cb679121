"""Vocabularies as byte strings: what every token id stands for, and where a token sequence ends in its text.

The bytes come from the fast tokenizer's own definition (model, normalizer, pre-tokenizer, decoder), never
from `decode([id])`, which turns byte tokens into U+FFFD, drops SentencePiece's leading space, and changes with
the tokenizer's class and version.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fusechat.errors import DataError

METASPACE = "▁"
# What special tokens strip, in UTF-8: Unicode's White_Space, as the tokenizers package has it.
_WHITESPACE = re.compile(
    rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)*"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Role(enum.IntEnum):
    """What a token is for; alignment pairs all but TEXT by role, never by spelling."""

    TEXT = 0
    BOS = 1
    EOS = 2
    TURN = 3
    """Ends a turn, such as <|im_end|>, <|end_of_turn|> and <|eot_id|>."""
    OTHER = 4
    """Any other special token."""
    ABSENT = 5
    """An id without a token: the padding of an embedding."""


_TURN_NAMES = frozenset(
    ("<|im_end|>", "<|end_of_turn|>", "<end_of_turn>", "<|eot_id|>", "<|eot|>", "<|end|>", "<|eom_id|>")
    + ("<|END_OF_TURN_TOKEN|>", "<turn|>")
)
_EOS_NAMES = frozenset(
    ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>")
)
_BOS_NAMES = frozenset(
    (
        "<s>",
        "<bos>",
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<|begin▁of▁sentence|>",
        "<｜begin▁of▁sentence｜>",
    )
    + ("<BOS_TOKEN>",)
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ByteTable:
    """A vocabulary's tokens as bytes.

    `data` uint8[B] holds all tokens' bytes end to end, `offsets` int64[V+1] where each begins, `roles` uint8[V] a
    Role per id. Special tokens' bytes are their own text, which is how templates write them. `sha256` covers all
    three arrays.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    roles: npt.NDArray[np.uint8]
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for array in (self.data, self.offsets, self.roles):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array).tobytes())
            array.setflags(write=False)
        object.__setattr__(self, "sha256", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.roles)

    def token(self, token_id: int) -> bytes:
        """Return the bytes of one token; empty for an absent id."""
        return self.data[self.offsets[token_id] : self.offsets[token_id + 1]].tobytes()

    def tokens(self) -> list[bytes]:
        """Return the bytes of all tokens by id."""
        data, offsets = self.data.tobytes(), self.offsets.tolist()
        return [data[begin:end] for begin, end in itertools.pairwise(offsets)]

    @property
    def widths(self) -> npt.NDArray[np.int64]:
        """The number of bytes of every token, int64[V]."""
        return np.diff(self.offsets)

    def concatenate(self, ids: npt.NDArray[np.integer[Any]]) -> bytes:
        """Return the bytes of a token sequence, end to end."""
        ids = np.asarray(ids, dtype=np.int64)
        starts, widths = self.offsets[ids], self.offsets[ids + 1] - self.offsets[ids]
        ends = np.cumsum(widths)
        total = int(ends[-1]) if len(ends) else 0
        joined: bytes = self.data[np.arange(total) + np.repeat(starts - (ends - widths), widths)].tobytes()
        return joined

    @classmethod
    def from_tokens(cls, tokens: Sequence[bytes], roles: Sequence[int] | None = None) -> ByteTable:
        """Build a table from byte strings, index = id; without `roles` every token is text."""
        offsets = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum([len(token) for token in tokens], out=offsets[1:])
        kinds = np.zeros(len(tokens), np.uint8) if roles is None else np.asarray(roles, np.uint8)
        return cls(data=np.frombuffer(b"".join(tokens), np.uint8).copy(), offsets=offsets, roles=kinds)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocab_size: int | None = None) -> ByteTable:
        """Build the table of a fast tokenizer (of `transformers`, or a `tokenizers.Tokenizer`).

        `vocab_size` is the number of the embedding's rows: ids from the tokenizer's last token up to it are
        ABSENT. Raises DataError when the tokenizer is not a fast one, is of a kind whose tokens are not byte
        strings (WordPiece, word-level, end-of-word suffixes), or has more tokens than `vocab_size`.
        """
        definition = _definition(tokenizer)
        decode = _token_decoder(definition)
        entries: dict[int, tuple[bytes, Role]] = {}
        model = definition["model"]
        vocab = model["vocab"]
        pieces = vocab.items() if isinstance(vocab, dict) else ((p[0], i) for i, p in enumerate(vocab))
        for text, token_id in pieces:
            entries[token_id] = decode(text), Role.TEXT
        unknown = model.get("unk_token")
        unknown_id = vocab.get(unknown) if isinstance(vocab, dict) else model.get("unk_id")
        if unknown_id is not None:
            text = unknown if unknown is not None else vocab[unknown_id][0]
            entries[unknown_id] = text.encode(), Role.OTHER
        bos, eos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "eos_token", None)
        for added in definition.get("added_tokens") or ():
            text = added["content"]
            entries[added["id"]] = text.encode(), _role(text, special=added["special"], bos=bos, eos=eos)
        size = max(entries, default=-1) + 1
        if vocab_size is not None and vocab_size < size:
            raise DataError(
                f"the tokenizer {_name(tokenizer)} has {size} ids, the model's embedding only {vocab_size} "
                "rows: it is not the model's own, or tokens were added without resizing the embedding"
            )
        rows = [entries.get(i, (b"", Role.ABSENT)) for i in range(vocab_size or size)]
        return cls.from_tokens([row[0] for row in rows], [row[1] for row in rows])


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _definition(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise DataError(
            f"the tokenizer {_name(tokenizer)} ({type(tokenizer).__name__}) is not a fast one: "
            "its definition cannot be read; save it with a tokenizer.json"
        )
    definition: dict[str, Any] = json.loads(backend.to_str())
    model = definition["model"]
    if (
        model.get("type") not in ("BPE", "Unigram")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise DataError(
            f"the tokenizer {_name(tokenizer)} is of kind {model.get('type')}"
            f"{' with word affixes' if model.get('type') == 'BPE' else ''}, whose tokens are not byte "
            "strings: BPE (byte-level or with ▁) and Unigram can be aligned"
        )
    return definition


def _components(definition: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (stage, component) for every normalizer, pre-tokenizer and decoder, sequences flattened."""
    pending = [(stage, definition.get(stage)) for stage in ("decoder", "pre_tokenizer", "normalizer")]
    while pending:
        stage, component = pending.pop()
        if component is None:
            continue
        if component["type"] == "Sequence":
            inner = next(v for k, v in component.items() if k != "type")
            pending.extend((stage, c) for c in reversed(inner))
        else:
            yield stage, component


def _token_decoder(definition: dict[str, Any]) -> Callable[[str], bytes]:
    """Return the function from a vocabulary entry's text to its bytes."""
    byte_level, marks = False, set[str]()
    byte_fallback = bool(definition["model"].get("byte_fallback"))
    for stage, component in _components(definition):
        kind, content = component["type"], component.get("content")
        pattern = (component.get("pattern") or {}).get("String") if kind == "Replace" else None
        byte_level |= kind == "ByteLevel"
        byte_fallback |= kind == "ByteFallback"
        if kind == "Metaspace":
            marks.add(component.get("replacement", METASPACE))
        elif stage == "normalizer" and pattern == " " and content:
            marks.add(content)
        elif stage == "decoder" and content == " " and pattern:
            marks.add(pattern)
    alphabet = _byte_level_alphabet()

    def decode(text: str) -> bytes:
        if byte_level:
            values = [alphabet.get(c) for c in text]
            # An entry outside the alphabet cannot come from text: a control token, spelled out.
            return text.encode() if None in values else bytes(v for v in values if v is not None)
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        for mark in marks:
            text = text.replace(mark, " ")
        return text.encode()

    return decode


def _byte_level_alphabet() -> dict[str, int]:
    """Map GPT-2's stand-ins to bytes: printable Latin-1 is itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    hidden = [b for b in range(256) if b not in set(printable)]
    return alphabet | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def _role(text: str, *, special: bool, bos: str | None, eos: str | None) -> Role:
    if text in _TURN_NAMES:
        return Role.TURN
    if text in _EOS_NAMES or text == eos:
        return Role.EOS
    if text in _BOS_NAMES or text == bos:
        return Role.BOS
    # Some releases forget to mark their control tokens special; <|…|> is never prose.
    return Role.OTHER if special or re.fullmatch(r"<\|.*\|>", text) else Role.TEXT


def token_byte_ends(table: ByteTable, ids: Any, text: bytes) -> npt.NDArray[np.int64]:
    """Return where each token ends in the text it came from: cumulative byte ends, int64[T].

    SentencePiece's dummy prefix space (at the start, and after special tokens in legacy mode) has no width when
    the text has no space there. A special token that strips whitespace owns what it skipped. A BOS in front and an
    EOS behind that the text does not spell have no width. A literal ▁ that the tokenizer reads as a space has its
    three bytes. Raises DataError naming the first token that does not match: an unknown token, or a tokenizer that
    normalises its text.
    """
    ids = np.asarray(ids, dtype=np.int64)
    outside = (ids < 0) | (ids >= len(table))
    if outside.any():
        raise DataError(f"token id {int(ids[outside][0])} is outside the vocabulary of {len(table)}")
    mark = METASPACE.encode()
    try:
        return _Walk(table=table, ids=ids, text=text).ends()
    except DataError:
        if mark not in text or mark in table.concatenate(ids):
            raise
    folded = text.replace(mark, b" ")
    ends = _Walk(table=table, ids=ids, text=folded).ends()
    dropped_bytes = np.zeros(len(folded) + 1, np.int64)
    for index, match in enumerate(re.finditer(mark, text)):
        dropped_bytes[match.start() - index * (len(mark) - 1) + 1] = len(mark) - 1
    widened: npt.NDArray[np.int64] = ends + np.cumsum(dropped_bytes)[ends]
    return widened


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """One token sequence against one text: runs of text tokens, with special tokens between them."""

    table: ByteTable
    ids: npt.NDArray[np.int64]
    text: bytes

    def ends(self) -> npt.NDArray[np.int64]:
        joined = self.table.concatenate(self.ids)
        widths = self.table.widths[self.ids]
        ends = np.cumsum(widths)
        roles = self.table.roles[self.ids]
        if joined == self.text and not (roles == Role.ABSENT).any():
            return ends
        starts = ends - widths
        controls = np.flatnonzero(roles != Role.TEXT)
        out = np.empty(len(self.ids), np.int64)
        position = 0
        for left, right in itertools.pairwise([-1, *controls.tolist(), len(self.ids)]):
            if left >= 0:
                out[left] = position = self._pass_control(left, position)
            first = left + 1
            if first == right:
                continue
            segment = joined[starts[first] : ends[right - 1]]
            begin, virtual = self._place(segment, position, left, right)
            if left >= 0:
                out[left] = begin
            out[first:right] = begin - virtual + ends[first:right] - starts[first]
            position = int(out[right - 1])
        if position != len(self.text):
            last = self.table.token(int(self.ids[-1])) if len(self.ids) else b""
            spelled = last and self.text[:position].endswith(last)
            written_control = spelled and controls[-1:].tolist() == [len(self.ids) - 1]
            if not written_control or position + self._gap(position) != len(self.text):
                self._fail(len(self.ids), position)
            out[-1] = len(self.text)
        return out

    def _pass_control(self, index: int, position: int) -> int:
        """Step over one special token and the whitespace it stripped on its left."""
        token = self.table.token(int(self.ids[index]))
        if token:
            start = self._start(token, position)
            if self.text.startswith(token, start):
                return start + len(token)
            if self._may_be_unwritten(index):
                return position
        self._fail(index, position)

    def _start(self, token: bytes, position: int) -> int:
        """Return where `token` may begin: here, or behind the whitespace that follows."""
        return position if self.text.startswith(token, position) else position + self._gap(position)

    def _gap(self, position: int) -> int:
        run = _WHITESPACE.match(self.text, position)
        return run.end() - position if run else 0

    def _may_be_unwritten(self, index: int) -> bool:
        """Whether a post-processor may have added this token without the text spelling it."""
        at_an_end = index in (0, len(self.ids) - 1)
        # Either role at either end: GPT-2's kin use one token for both.
        return at_an_end and self.table.roles[self.ids[index]] in (Role.BOS, Role.EOS)

    def _place(self, segment: bytes, position: int, left: int, right: int) -> tuple[int, int]:
        """Find where the run of text tokens between two specials begins, and the width of its virtual space.

        A reading counts only if the special token after the run, or the end of the text, follows it.
        """
        gap = self._gap(position) if left >= 0 else 0
        for begin in (position, position + gap) if gap else (position,):
            for virtual in (0, 1) if segment.startswith(b" ") else (0,):
                end = begin + len(segment) - virtual
                if self.text.startswith(segment[virtual:], begin) and self._goes_on(end, right):
                    return begin, virtual
        self._fail(left + 1, position)

    def _goes_on(self, end: int, right: int) -> bool:
        if end == len(self.text):
            return right == len(self.ids) or self._may_be_unwritten(right)
        if right == len(self.ids):
            return False
        follower = self.table.token(int(self.ids[right]))
        return bool(follower) and self.text.startswith(follower, self._start(follower, end))

    def _fail(self, first: int, position: int) -> NoReturn:
        """Raise DataError naming the first token from `first` on that does not match the text at `position`."""
        for index in range(first, len(self.ids)):
            token_id = int(self.ids[index])
            token = self.table.token(token_id)
            is_text = self.table.roles[token_id] == Role.TEXT
            start = position if is_text else self._start(token, position)
            if index == first and is_text and not self.text.startswith(token, start):
                token = token.removeprefix(b" ")
            if not self.text.startswith(token, start) or not (token or is_text):
                raise DataError(
                    f"token {index} (id {token_id}, {self.table.token(token_id)!r}) does not match the text at byte "
                    f"{position} ({self.text[position : position + 16]!r}): the tokenizer has no token for it or "
                    "normalises the text; it cannot be aligned on this text"
                )
            position = start + len(token)
        raise DataError(
            f"the tokens end at byte {position}, the text goes on with {self.text[position : position + 24]!r}: "
            "the tokenizer drops text; it cannot be aligned on this text"
        )
