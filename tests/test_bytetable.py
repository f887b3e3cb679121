"""Byte tables and the walk: against tokenizers trained here, and against real ones when they are present."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fusechat.bytetable import ByteTable, Role, token_byte_ends
from fusechat.errors import DataError

CORPUS = [
    "Hello world, how are you today?",
    "  two  leading spaces\nand a newline\tand a tab",
    "naïve café, Straße, привет мир, 你好世界",
    "for i in range(10):\n    print(i)\n",
] * 8
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NASTY = [
    "",
    " ",
    "   ",
    "\n\n x",
    " Hello",
    "  Hello  world ",
    "\t\ttabs",
    "🦙.cpp 👩‍👩‍👧 é e\u0301",
    "literal ▁ mark ▁▁",
    "<0x41> <unkn> Ġ",
    "你好 мир",
]


def byte_level() -> Tokenizer:
    """A GPT-2 style tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS[1:],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """A Llama-2 style tokenizer: legacy dummy prefix, ▁, byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = SPECIALS + [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:3], trainer)
    # Byte tokens belong to the model only, as in released tokenizers.
    definition = tokenizer.to_str()
    tree = json.loads(definition)
    tree["added_tokens"] = [a for a in tree["added_tokens"] if a["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(tree))


def unigram() -> Tokenizer:
    """A Unigram tokenizer with Metaspace and no byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, sentencepiece_bpe, unigram])
def trained(request: pytest.FixtureRequest) -> tuple[Tokenizer, ByteTable]:
    tokenizer = request.param()
    return tokenizer, ByteTable.from_tokenizer(tokenizer)


def slow_ends(table: ByteTable, ids: list[int], text: bytes) -> list[list[int]]:
    """Every way to lay the tokens over the text, a leading space at the start or after a special being optional."""
    readings: list[list[int]] = [[]]
    for i, token_id in enumerate(ids):
        token = table.token(token_id)
        boundary = i == 0 or table.roles[ids[i - 1]] != Role.TEXT
        grown = []
        for reading in readings:
            start = reading[-1] if reading else 0
            forms = {token} | ({token[1:]} if boundary and token.startswith(b" ") else set())
            grown += [[*reading, start + len(form)] for form in forms if text.startswith(form, start)]
        readings = grown
    return [reading for reading in readings if (reading[-1] if reading else 0) == len(text)]


@pytest.mark.parametrize("text", CORPUS[:4] + NASTY)
def test_ends_are_the_only_consistent_reading(trained: tuple[Tokenizer, ByteTable], text: str) -> None:
    """Catches a wrong alphabet, ▁ left in, byte tokens spelled out, and a dummy space counted or lost."""
    tokenizer, table = trained
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    data = text.encode()
    if any(table.roles[i] != Role.TEXT for i in ids):
        with pytest.raises(DataError, match="<unk>"):
            token_byte_ends(table, ids, data)
        return
    ends = token_byte_ends(table, ids, data)
    folded = data.replace("▁".encode(), b" ") if data not in (table.concatenate(np.array(ids, int)),) else data
    if folded == data:
        assert ends.tolist() in slow_ends(table, ids, data)
    assert ends.dtype == np.int64
    assert (np.diff(ends) >= 0).all()
    assert (ends[-1] if len(ends) else 0) == len(data)


def test_dummy_space_is_virtual_only_where_the_text_has_none() -> None:
    """Catches a rule that always drops one space: ' Hello' keeps its real one."""
    table = ByteTable.from_tokens([b" ", b" Hello", b"<s>", b"  "], [0, 0, Role.BOS, 0])
    assert token_byte_ends(table, [1], b"Hello").tolist() == [5]
    assert token_byte_ends(table, [1], b" Hello").tolist() == [6]
    assert token_byte_ends(table, [0, 1], b" Hello").tolist() == [0, 6]
    assert token_byte_ends(table, [2, 0, 1], b"<s> Hello").tolist() == [3, 3, 9]
    assert token_byte_ends(table, [3, 1], b"  Hello").tolist() == [1, 7]


def test_specials_own_the_whitespace_they_strip() -> None:
    """Catches whitespace given to the wrong token around lstrip and rstrip specials."""
    table = ByteTable.from_tokens([b"a", b"<|user|>", b" b"], [0, Role.OTHER, 0])
    assert token_byte_ends(table, [0, 1, 0], b"a \n<|user|>\n a").tolist() == [1, 13, 14]
    assert token_byte_ends(table, [1, 2], b"<|user|>\nb").tolist() == [9, 10]
    assert token_byte_ends(table, [0, 1], b"a<|user|>\n").tolist() == [1, 10]
    for space in "\x85\xa0\u1680\u2000\u200a\u2028\u202f\u205f\u3000":
        n = len(space.encode())
        ends = token_byte_ends(table, [0, 1, 0], f"a{space}<|user|>\n{space}a".encode())
        assert ends.tolist() == [1, 10 + 2 * n, 11 + 2 * n]
        assert token_byte_ends(table, [0, 1], f"a<|user|>{space}".encode()).tolist() == [1, 9 + n]
    with pytest.raises(DataError, match="text goes on"):
        token_byte_ends(table, [0, 1], "a<|user|>\u200b".encode())  # no white space, whatever it looks like


def test_unwritten_bos_and_eos_have_no_width() -> None:
    """Catches a post-processor's <s> or </s> shifting every end."""
    table = ByteTable.from_tokens([b"<s>", b"</s>", b" a", b"b"], [Role.BOS, Role.EOS, 0, 0])
    assert token_byte_ends(table, [0, 2, 3, 1], b"ab").tolist() == [0, 1, 2, 2]
    with pytest.raises(DataError, match="token 1"):
        token_byte_ends(table, [2, 0, 3], b"ab")


def test_a_literal_mark_keeps_its_three_bytes() -> None:
    """Catches ends that shrink by two bytes for every ▁ the user typed."""
    table = ByteTable.from_tokens([b" a", b" ", b"b"])
    assert token_byte_ends(table, [0, 1, 2, 1], "a▁b▁".encode()).tolist() == [1, 4, 5, 8]


def test_a_literal_mark_is_not_blamed_for_another_mismatch() -> None:
    """Catches an error that names the ▁ of a text whose é the tokenizer composed."""
    table = ByteTable.from_tokens(["▁".encode(), "é".encode()])
    with pytest.raises(DataError, match=r"token 1 \(id 1"):
        token_byte_ends(table, [0, 1], "▁e\u0301".encode())


@pytest.mark.parametrize(
    ("ids", "text", "named"),
    [
        ([0, 2], b"ab", "token 1 .id 2, b'<unk>'"),
        ([0, 1], b"aB", "token 1 .id 1"),
        ([0], b"ab", "text goes on"),
        ([0, 1], b"a", "token 1"),
        ([0, 3], b"a", "token 1 .id 3"),
        ([7], b"a", "id 7 is outside the vocabulary of 4"),
        ([-1], b"a", "id -1 is outside"),
    ],
)
def test_a_mismatch_names_its_token(ids: list[int], text: bytes, named: str) -> None:
    """Catches silent misalignment: every disagreement is an error that says where."""
    table = ByteTable.from_tokens([b"a", b"b", b"<unk>", b""], [0, 0, Role.OTHER, Role.ABSENT])
    with pytest.raises(DataError, match=named):
        token_byte_ends(table, ids, text)


def test_roles_and_padding() -> None:
    """Catches turn ends read as plain specials, padded ids read as tokens, and a too small embedding accepted."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("    ", normalized=True)])
    size = tokenizer.get_vocab_size()
    table = ByteTable.from_tokenizer(tokenizer, size + 3)
    roles = {t: table.roles[tokenizer.token_to_id(t)] for t in (*SPECIALS[1:], "    ")}
    assert roles == {
        "<s>": Role.BOS,
        "</s>": Role.EOS,
        "<|im_start|>": Role.OTHER,
        "<|im_end|>": Role.TURN,
        "    ": Role.TEXT,
    }
    assert table.token(tokenizer.token_to_id("    ")) == b"    "
    assert table.roles[size - 1 : size + 3].tolist() == [Role.TEXT] + [Role.ABSENT] * 3
    assert len(table) == size + 3
    with pytest.raises(DataError, match=rf"{size} ids.*only {size - 1} rows"):
        ByteTable.from_tokenizer(tokenizer, size - 1)


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}, unk_token="a"), models.WordPiece({"a": 0})])
def test_other_kinds_are_refused(model: Any) -> None:
    """Catches a word-level vocabulary aligned as if its words were bytes."""
    with pytest.raises(DataError, match="not byte strings"):
        ByteTable.from_tokenizer(Tokenizer(model))


def test_sha256_covers_bytes_boundaries_and_roles() -> None:
    """Catches a hash of the concatenation only."""
    hashes = {
        ByteTable.from_tokens(tokens, roles).sha256
        for tokens, roles in [([b"ab", b"c"], [0, 0]), ([b"a", b"bc"], [0, 0]), ([b"ab", b"c"], [0, 2])]
    }
    assert len(hashes) == 3
    assert ByteTable.from_tokens([b"ab", b"c"]).sha256 in hashes


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=60), seed=st.integers(0, 2**32))
def test_random_segmentations_of_random_bytes(data: bytes, seed: int) -> None:
    """Catches ends that are not the cumulative widths, on invalid UTF-8 too."""
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(data) + 1), rng.randint(0, len(data)))) if data else []
    bounds = [0, *[c for c in cuts if 0 < c < len(data)], len(data)] if data else [0]
    pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
    vocabulary = sorted(set(pieces)) or [b"x"]
    table = ByteTable.from_tokens(vocabulary)
    ids = [vocabulary.index(p) for p in pieces]
    assert token_byte_ends(table, ids, data).tolist() == bounds[1:]
    assert table.concatenate(np.array(ids, np.int64)) == data


def test_no_torch_is_loaded() -> None:
    """Catches an import of torch in the byte tables, which the light commands use."""
    code = "import sys, fusechat.bytetable; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


REAL = [
    "tokenizers/gpt2",
    "tokenizers/internlm2-chat",
    "tokenizers/llama-2",
    "tokenizers/llama-2-exact",
    "tokenizers/llama-3",
    "tokenizers/nous-hermes-2-solar-exact",
    "tokenizers/openchat-3.5",
    "tokenizers/openchat-3.5-exact",
    "tokenizers/phi-3-mini",
    "tokenizers/pythia",
    "tokenizers/qwen2-instruct",
    "tokenizers/t5-small",
    "models/stories260K",
    "models/aidreams231K",
    "models/babyllama-tok105",
]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_on_published_hard_strings(shared_data: Path, name: str) -> None:
    """Catches any real tokenizer whose bytes do not concatenate to the text and are not refused by name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / name)
    table = ByteTable.from_tokenizer(tokenizer)
    fixture = shared_data / "tokenizers" / "_fixtures" / "ggml-vocab-llama-bpe.gguf.inp"
    lines = fixture.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    refused = 0
    for line in lines:
        data = line.encode()
        for special in (False, True):
            ids = tokenizer(line, add_special_tokens=special).input_ids
            text_ids = np.array([i for i in ids if table.roles[i] == Role.TEXT], np.int64)
            if name.endswith(("t5-small", "babyllama-tok105")) and table.concatenate(text_ids) not in (
                data,
                b" " + data,
            ):
                with pytest.raises(DataError):
                    token_byte_ends(table, ids, data)
                refused += 1
                continue
            ends = token_byte_ends(table, ids, data)
            assert (ends[-1] if len(ends) else 0) == len(data)
            assert table.concatenate(text_ids) in (data, b" " + data)
    assert len(lines) == 47
    assert (refused > 0) == name.endswith(("t5-small", "babyllama-tok105"))
