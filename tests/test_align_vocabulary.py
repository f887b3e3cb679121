"""Vocabulary maps: byte twins, first pieces, roles and leads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align import vocab_map
from fusechat.align.tokenizer import store_vocabulary
from fusechat.align.vocabulary import Quality
from fusechat.artifact import Json
from fusechat.bytetable import ByteTable, Role
from fusechat.errors import ConfigError, MismatchError

PIECES = st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=30)


@settings(deadline=None, max_examples=200)
@given(source=PIECES, pivot=PIECES)
def test_prefix_map_is_the_longest_pivot_token_the_bytes_begin_with(source: list[bytes], pivot: list[bytes]) -> None:
    """Catches a twin missed, a piece that is no prefix, and a shorter piece where a longer one fits."""
    s, p = ByteTable.from_tokens(source), ByteTable.from_tokens(pivot)
    exact, prefix = vocab_map(s, p, "exact"), vocab_map(s, p, "prefix")
    for i, token in enumerate(source):
        fitting = [q for q in pivot if token.startswith(q)]
        assert (exact.target[i, 0] >= 0) == (token in pivot)
        assert (prefix.target[i, 0] >= 0) == bool(fitting)
        if fitting:
            assert pivot[prefix.target[i, 0]] == max(fitting, key=len)
            assert prefix.quality[i] == (Quality.EXACT if token in pivot else Quality.APPROXIMATE)
        else:
            assert prefix.quality[i] == Quality.LOST


def test_the_pivots_own_tokenization_decides() -> None:
    """Catches the longest prefix taken where the pivot's tokenizer begins with a shorter token, and lies believed."""
    s, p = ByteTable.from_tokens([b"abc", b"\xff\xfe", b"xyz"]), ByteTable.from_tokens([b"a", b"ab", b"\xff", b"x"])
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[0, 1], [2]]

    got = vocab_map(s, p, "prefix", pivot_encode=encode)
    assert asked == ["abc", "xyz"]
    assert got.target[:, 0].tolist() == [0, 2, 3]  # b"\xff" does not begin "xyz": the tokenizer normalised it away


def test_roles_map_by_role_and_never_by_spelling() -> None:
    """Catches an end of turn compared as text, text mapped to a special of its spelling, and padding mapped at all."""
    source = ByteTable.from_tokens(
        [b"</s>", b"<|im_end|>", b"<s>", b"<tool>", b"<x>", b"</s>", b""],
        [Role.EOS, Role.TURN, Role.BOS, Role.OTHER, Role.OTHER, Role.TEXT, Role.ABSENT],
    )
    pivot = ByteTable.from_tokens(
        [b"<bos>", b"<eos>", b"<end>", b"<tool>", b"</s>", b"<x>"],
        [Role.BOS, Role.EOS, Role.TURN, Role.OTHER, Role.EOS, Role.TEXT],
    )
    got = vocab_map(source, pivot, "exact")
    assert got.target[:, 0].tolist() == [2, 2, 0, 3, -1, -1, -1]
    assert got.quality.tolist() == [1, 1, 1, 1, 0, 0, 0]
    without_turn = ByteTable.from_tokens([b"<eos>"], [Role.EOS])
    assert vocab_map(source, without_turn, "exact").target[:, 0].tolist()[:2] == [0, 0]


def test_of_two_pivot_tokens_with_equal_bytes_the_tokenizers_own_wins() -> None:
    """Catches mass put on the byte token <0x41>, which the tokenizer never emits for an A."""
    assert vocab_map(ByteTable.from_tokens([b"A"]), ByteTable.from_tokens([b"A", b"B", b"A"])).target[
        :, 0
    ].tolist() == [2]


def test_leads_move_the_space_that_a_turns_first_token_carries() -> None:
    """Catches 'Hello' mapped to 'Hello' where the pivot's first token of a message is ' Hello'."""
    bare, spaced = ByteTable.from_tokens([b"Hi", b"Ho"]), ByteTable.from_tokens([b"Hi", b" Hi", b" ", b"Ho"])
    got = vocab_map(bare, spaced, "prefix", pivot_lead=b" ")
    assert got.target[:, 0].tolist() == [1, 2]
    assert got.quality.tolist() == [1, 2]
    back = vocab_map(spaced, bare, "exact", source_lead=b" ")
    assert back.target[:, 0].tolist() == [0, 0, -1, 1]


def test_unknown_method_is_refused() -> None:
    """Catches a misspelt method that maps nothing."""
    with pytest.raises(ConfigError, match="'fuzzy' is not one of"):
        vocab_map(ByteTable.from_tokens([b"a"]), ByteTable.from_tokens([b"a"]), "fuzzy")


REAL = ["openchat-3.5-exact", "gpt2", "phi-3-mini"]


def manifest(directory: Path, sha256: str, vocab_size: int) -> Json:
    return {"model": str(directory), "tokenizer_sha256": sha256, "vocab_size": vocab_size}


@pytest.mark.parametrize("name", REAL)
def test_continuations_have_no_dummy_space(shared_data: Path, name: str) -> None:
    """Catches a continuation encoder that puts a space in front, loses one, or reads '<s>' as a special token."""
    from transformers import AutoTokenizer

    directory = shared_data / "tokenizers" / name
    table = ByteTable.from_tokenizer(AutoTokenizer.from_pretrained(directory))
    vocabulary = store_vocabulary(Path("store"), manifest(directory, table.sha256, len(table)))
    assert vocabulary.table.sha256 == table.sha256
    texts = ["Hello", " Hello", "ation", "<s>x</s>", "\n\n", "你好"]
    for text, ids in zip(texts, vocabulary.continuation_encoder()(texts), strict=True):
        assert table.concatenate(np.array(ids)) == text.encode()
    with pytest.raises(MismatchError, match=f"{table.sha256}.*feed"):
        store_vocabulary(Path("store"), manifest(directory, "feed", len(table)))


def test_mistral_and_qwen_share_their_bytes(shared_data: Path) -> None:
    """Catches a byte table that loses twins: by bytes these two share over 29,000 tokens, by decoded strings 24,764."""
    from transformers import AutoTokenizer

    mistral, qwen = (
        ByteTable.from_tokenizer(AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name))
        for name in ("openchat-3.5-exact", "qwen2-instruct")
    )
    text = qwen.roles == Role.TEXT
    shared = {qwen.token(i) for i in np.flatnonzero(text)} & {
        mistral.token(i) for i in np.flatnonzero(mistral.roles == Role.TEXT)
    }
    mapped = vocab_map(qwen, mistral, "exact")
    assert (mapped.target[text, 0] >= 0).sum() == len(shared)
    assert len(shared) > 29_000
