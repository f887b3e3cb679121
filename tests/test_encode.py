"""Encodings: masks and byte ends against the tokenizer's own character offsets, cuts, skips, real tokenizers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusechat.bytetable import ByteTable, Role
from fusechat.demo.tokenizers import KINDS
from fusechat.dialogue import load_dialogues
from fusechat.encode import EncodedSet, Skipped, encode_all, encode_set
from fusechat.errors import DataError
from fusechat.records import Dialogue, Encoded, Message
from fusechat.spans import render_dialogue
from fusechat.template import Template, load_template

CORPUS = [
    "Hello world, how are you today?\nI am fine.",
    "for i in range(10):\n    print(i)  # done",
    "Straße, naïve café, привет мир, 你好世界",
    "user assistant [INST] Hello [/INST] ### Response: ### Instruction:",
] * 6
OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] "
    "+ eos_token }}{% endfor %}"
)
RESPONSE = (
    "{% for m in messages %}{{ ('### Response:\n' if m['role'] == 'assistant' else '### Instruction:\n') "
    "+ m['content'] + '\n\n' }}{% endfor %}"
)
TIGHT = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"
TEMPLATES = {"own": None, "openchat": OPENCHAT, "response": RESPONSE, "tight": TIGHT}


@functools.cache
def trained(kind: str) -> tuple[Any, ByteTable]:
    tokenizer = KINDS[kind](CORPUS, 600)
    return tokenizer, ByteTable.from_tokenizer(tokenizer)


def template_for(name: str, tokenizer: Any) -> Template:
    return load_template(tokenizer) if name == "own" else Template(name=name, jinja=TEMPLATES[name])


def chat(*contents: str) -> Dialogue:
    turns = [Message(role="assistant" if i % 2 else "user", content=c) for i, c in enumerate(contents)]
    return Dialogue(messages=tuple(turns))


def plain(text: str, *, goes_on: bool = False) -> Dialogue:
    return Dialogue(messages=(Message(role="assistant", content=text),), plain=True, goes_on=goes_on)


def encode(
    dialogue: Dialogue, tokenizer: Any, table: ByteTable, *, template: Template, max_length_tokens: int | None
) -> tuple[Encoded, int] | Skipped:
    """A dialogue's encoding and how many assistant turns were cut to make it fit, or why it has none."""
    result = encode_set([dialogue], tokenizer, table, template=template, max_length_tokens=max_length_tokens)
    if result.skipped:
        return Skipped(reason=result.skipped[0])
    return result.encoded[0], result.cut_turns.get(0, 0)


def reference_mask(dialogue: Dialogue, tokenizer: Any, template: Template) -> list[tuple[int, int]]:
    """The (id, turn) of every token up to the last assistant one, from character offsets, one token at a time."""
    rendered = render_dialogue(template, tokenizer, dialogue)
    out = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    turns = [-1] * len(out["input_ids"])
    for n, span in enumerate(rendered.spans):
        ending = False
        for t, (token, (start, end)) in enumerate(zip(out["input_ids"], out["offset_mapping"])):
            if start < span.end and end > span.start and not (token in special and start < span.start):
                turns[t] = n
            elif start >= span.end and end <= span.turn_end and not ending:
                turns[t] = n
                ending = token in special
    while turns and turns[-1] < 0:
        turns.pop()
    return list(zip(out["input_ids"], turns))


def check(dialogue: Dialogue, encoded: Encoded, table: ByteTable) -> None:
    """What every encoding promises: see the record's docstring."""
    answers = [m.content.encode() for m in dialogue.messages if m.role == "assistant"]
    assert len(encoded.input_ids) == len(encoded.loss_mask) == len(encoded.turn) == len(encoded.byte_end)
    assert (encoded.input_ids.dtype, encoded.turn.dtype, encoded.byte_end.dtype) == (np.int32,) * 3
    assert np.array_equal(encoded.loss_mask, encoded.turn >= 0)
    assert np.array_equal(encoded.loss_mask, encoded.byte_end >= 0)
    assert encoded.loss_mask[-1]
    for n, answer in enumerate(answers):
        where = np.flatnonzero(encoded.turn == n)
        assert np.array_equal(where, np.arange(where[0], where[-1] + 1)), "a turn is one run of tokens"
        ends = encoded.byte_end[where]
        assert (np.diff(ends) >= 0).all()
        assert ends[0] >= 0
        assert answer[: ends[-1]].strip() == answer.strip()
        # Each token's bytes end with the content's bytes up to its end, as far as it lies in the content.
        for token, before, end in zip(encoded.input_ids[where], [None, *ends[:-1]], ends):
            if before is not None and end > before and table.roles[token] == Role.TEXT:
                piece, own = answer[before:end], table.token(int(token))
                if "▁".encode() not in answer:
                    assert own[: len(piece)] == piece


CONTENT = st.text(alphabet="aeH 1:\n.é你😀▁", min_size=1, max_size=16).filter(lambda text: text.strip() != "")


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(TEMPLATES)),
    st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3),
)
def test_masks_and_ends(kind: str, name: str, turns: list[tuple[str, str]]) -> None:
    """Catches shifted masks, lost straddling tokens, ends outside the content, and turns that run into the next."""
    tokenizer, table = trained(kind)
    template = template_for(name, tokenizer)
    dialogue = chat(*(content for turn in turns for content in turn))
    result = encode(dialogue, tokenizer, table, template=template, max_length_tokens=None)
    assert not isinstance(result, Skipped), result
    encoded, cut = result
    assert cut == 0
    if "▁" not in str(dialogue):  # the tokenizers' own offsets are off by two bytes there
        got = list(zip(encoded.input_ids.tolist(), encoded.turn.tolist()))
        want = reference_mask(dialogue, tokenizer, template)
        # A dummy ▁ in front of the content has an offset of no width or of the next character: either is right.
        spaces = {i for i in range(len(table)) if table.token(i) == b" "}
        assert [g for g in got if g[0] not in spaces] == [w for w in want if w[0] not in spaces]
    check(dialogue, encoded, table)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(KINDS)), CONTENT.map(str.strip), st.booleans())
def test_running_text(kind: str, text: str, goes_on: bool) -> None:
    """Catches a first token that nothing predicts, an EOS not taught or taught inside a document, and lost bytes."""
    tokenizer, table = trained(kind)
    result = encode(
        plain(text, goes_on=goes_on),
        tokenizer,
        table,
        template=Template(name="plain", jinja=None),
        max_length_tokens=None,
    )
    assert not isinstance(result, Skipped)
    encoded = result[0]
    front = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids.tolist() == [front, *own] + [tokenizer.eos_token_id] * (not goes_on)
    assert encoded.loss_mask.tolist() == [False] + [True] * (len(encoded.input_ids) - 1)
    assert encoded.byte_end[len(own) :].tolist() == [len(text.encode())] * (1 if goes_on else 2)
    check(plain(text), encoded, table)


def test_straddling_tokens_belong_to_the_turn() -> None:
    """Catches " Hello" lost because its space is the template's, and its end counted with that space."""
    tokenizer, table = trained("byte_level_bpe")
    jinja = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    result = encode(
        chat("a", "Hello world"), tokenizer, table, template=Template(name="x", jinja=jinja), max_length_tokens=None
    )
    assert not isinstance(result, Skipped)
    encoded = result[0]
    masked = [table.token(int(i)) for i in encoded.input_ids[encoded.loss_mask]]
    assert masked == [b" Hello", b" world", b"<|im_end|>"]
    assert encoded.byte_end[encoded.loss_mask].tolist() == [5, 11, 11]


def test_trimmed_contents_count_in_the_original() -> None:
    """Catches two models' equal byte ends that mean different texts, because one model's template trims."""
    ends = {}
    for kind in ("byte_level_bpe", "byte_level_with_headers"):
        tokenizer, table = trained(kind)
        result = encode(
            chat("a", "  Hello world \n"), tokenizer, table, template=load_template(tokenizer), max_length_tokens=None
        )
        assert not isinstance(result, Skipped)
        encoded = result[0]
        rows = zip(encoded.input_ids[encoded.loss_mask], encoded.byte_end[encoded.loss_mask])
        ends[kind] = {table.token(int(i)): int(end) for i, end in rows}
    assert ends["byte_level_with_headers"][b"Hello"] == ends["byte_level_bpe"][b" Hello"] == 7
    assert ends["byte_level_with_headers"][b"<|eot_id|>"] == 13
    assert ends["byte_level_bpe"][b"<|im_end|>"] == 15


def test_a_special_token_that_swallows_space_is_not_content() -> None:
    """Catches the header in the loss: Phi-3's <|assistant|> owns the white space behind it, and <|end|> that before."""
    tokenizer = KINDS["byte_level_bpe"](CORPUS, 400)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|a|>", rstrip=True), AddedToken("<|e|>", lstrip=True)]}
    )
    table = ByteTable.from_tokenizer(tokenizer)
    jinja = "{% for m in messages %}{{ '<|' + m['role'][0] + '|>\n' + m['content'] + '<|e|>\n' }}{% endfor %}"
    result = encode(
        chat("q", " Hello \n"), tokenizer, table, template=Template(name="x", jinja=jinja), max_length_tokens=None
    )
    assert not isinstance(result, Skipped)
    encoded = result[0]
    assert [table.token(int(i)) for i in encoded.input_ids[encoded.loss_mask]] == [b"Hello", b"<|e|>"]
    assert encoded.byte_end[encoded.loss_mask].tolist() == [6, 6]


@pytest.mark.parametrize("kind", list(KINDS))
def test_over_long_dialogues_lose_whole_turns_from_the_end(kind: str) -> None:
    """Catches cuts inside a turn, cuts that go further than they must, and cuts nobody counted."""
    tokenizer, table = trained(kind)
    template = load_template(tokenizer)
    dialogue = chat("one", "Hello", "two", "world how are", "three", "you today? " * 9)
    lengths = []
    for turns in (1, 2, 3):
        whole = encode(chat(*[m.content for m in dialogue.messages[: 2 * turns]]), tokenizer, table,
                       template=template, max_length_tokens=None)  # fmt: skip
        assert not isinstance(whole, Skipped)
        lengths.append(len(whole[0].input_ids))
    for limit in range(1, lengths[-1] + 2):
        result = encode(dialogue, tokenizer, table, template=template, max_length_tokens=limit)
        fitting = sum(length <= limit for length in lengths)
        if fitting == 0:
            assert isinstance(result, Skipped)
            assert f"no assistant turn ends within {limit} tokens" in result.reason
        else:
            assert not isinstance(result, Skipped)
            assert (len(result[0].input_ids), result[1]) == (lengths[fitting - 1], 3 - fitting)


def test_a_set_reports_places_cuts_and_skips() -> None:
    """Catches encodings attached to the wrong dialogue after a skip, and losses that are not reported."""
    tokenizer, table = trained("byte_level_with_headers")
    refused = Template(
        name="strict",
        jinja="{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
        + str(tokenizer.chat_template),
    )
    dialogues = [chat("a", f"answer {i}", "b", "c " * i) for i in range(1, 600)]
    dialogues[3] = chat("no", "x")
    dialogues[5] = plain("word " * 200)
    result = encode_all(dialogues, tokenizer, table, template=refused, max_length_tokens=120)
    assert result.skipped == {
        3: "the template refuses it: not this one",
        5: "running text longer than 120 tokens: set max_bytes to have it cut",
    }
    assert sorted([*result.index, *result.skipped]) == list(range(599))
    assert len(result.cut_turns) > 400
    for place, encoded in zip(result.index, result.encoded):
        cut = result.cut_turns.get(place, 0)
        assert encoded.turn.max() == 1 - cut
        check(Dialogue(messages=dialogues[place].messages[: 4 - 2 * cut]), encoded, table)
        last = encoded.input_ids[encoded.turn == 0][:-1]
        assert table.concatenate(last).decode() == f"answer {place + 1}"
    said = str(result)
    assert "597 dialogues" in said
    assert "1 × the template refuses it: not this one" in said
    assert f"{len(result.cut_turns)} turns cut" in said


def test_text_the_tokenizer_cannot_spell_is_skipped_with_the_token() -> None:
    """Catches an unknown token whose byte end would be a guess; and a set of which nothing is left."""
    vocab = [("<unk>", 0.0), ("▁", -1.0), ("a", -1.0)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    table = ByteTable.from_tokenizer(tokenizer)
    template = Template(name="plain", jinja=None)
    result = encode(plain("a x"), tokenizer, table, template=template, max_length_tokens=None)
    assert isinstance(result, Skipped)
    assert "cannot be encoded: token 3" in result.reason
    with pytest.raises(DataError, match="no dialogue can be encoded with the template plain"):
        encode_all([plain("a x")], tokenizer, table, template=template, max_length_tokens=None)


@pytest.mark.parametrize(
    "name",
    ["openchat-3.5-exact", "nous-hermes-2-solar-exact", "internlm2-chat", "qwen2-instruct", "llama-3", "phi-3-mini"],
)
def test_real_tokenizers(shared_data: Path, name: str) -> None:
    """Catches what only published tokenizers and texts do: legacy dummy spaces, stripping specials, CJK in bytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    table = ByteTable.from_tokenizer(tokenizer)
    template = load_template(tokenizer)
    dialogues = load_dialogues(shared_data / "derived" / "alpaca_zh_demo.dev.json", limit=60)
    dialogues += load_dialogues(shared_data / "chat" / "fastchat" / "data" / "dummy_conversation.json", limit=40)
    result: EncodedSet = encode_all(dialogues, tokenizer, table, template=template, max_length_tokens=None)
    assert result.index == list(range(100))
    for place, encoded in zip(result.index, result.encoded):
        check(dialogues[place], encoded, table)
        got = [(int(i), int(n)) for i, n in zip(encoded.input_ids, encoded.turn)]
        assert got == reference_mask(dialogues[place], tokenizer, template)
