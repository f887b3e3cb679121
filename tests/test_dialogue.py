"""Readers, cleaning, keys and the split: every layout and every way a file can be wrong."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusechat
from fusechat.data.cleaning import (
    EMPTY_ASSISTANT,
    EMPTY_SYSTEM,
    LEADING_ASSISTANT,
    NO_ASSISTANT,
    UNANSWERED_SYSTEM,
    UNANSWERED_USER,
    clean_messages,
    cut_text,
)
from fusechat.dialogue import (
    dataset_fingerprint,
    dialogue_key,
    load_dialogues,
    read_dialogues,
    split_held_out,
)
from fusechat.errors import ConfigError, DataError
from fusechat.records import Dialogue, Message, RoleName

SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}


def write(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return path


def dialogue(*contents: str, category: str = "") -> Dialogue:
    roles: tuple[RoleName, RoleName] = ("user", "assistant")
    return Dialogue(
        messages=tuple(Message(role=roles[i % 2], content=c) for i, c in enumerate(contents)), category=category
    )


def contents(d: Dialogue) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in d.messages]


def test_all_layouts_give_the_same_dialogue(tmp_path: Path) -> None:
    """Catches a reader that swaps roles, loses the system turn or the category, or reads one container wrongly."""
    expected = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!")]
    turns = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello!")]
    sharegpt = {"conversations": [{"from": r, "value": c} for r, c in turns], "category": "talk"}
    openai = {"messages": [{"role": r, "content": c} for r, c in expected], "topic": "talk"}
    parts = {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in expected], "topic": "talk"}
    alpaca = {"instruction": "Hi", "input": "", "output": "Hello!", "system": "Be kind.", "category": "talk"}
    for name, item in {"s": sharegpt, "o": openai, "p": parts, "a": alpaca}.items():
        files = [
            write(tmp_path / f"{name}.jsonl", [item, item]),
            tmp_path / f"{name}.json",
            tmp_path / f"{name}.parquet",
        ]
        files[1].write_text(json.dumps([item, item], indent=2))
        pq.write_table(pa.Table.from_pylist([item, item]), files[2])
        for file in files:
            loaded = load_dialogues(file)
            assert [contents(d) for d in loaded] == [expected, expected], file
            assert {d.category for d in loaded} == {"talk"}


def test_alpaca_puts_the_input_behind_the_instruction(tmp_path: Path) -> None:
    """Catches an input that is lost."""
    file = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert contents(load_dialogues(file)[0]) == [("user", "Add.\n\n1 2"), ("assistant", "3")]


def test_a_json_file_of_lines_and_unicode_line_ends_inside_strings(tmp_path: Path) -> None:
    """Catches splitting lines at U+2028 and trusting the file's ending."""
    item = {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c\x85d"}]}
    path = tmp_path / "lines.json"
    path.write_text(json.dumps(item, ensure_ascii=False) + "\r\n\n" + json.dumps(item, ensure_ascii=False), "utf-8")
    assert [contents(d)[0][1] for d in load_dialogues(path)] == ["a\u2028b"] * 2


@pytest.mark.parametrize(
    ("roles", "kept", "dropped"),
    [
        ("Uaua", "Uaua", {}),
        ("sUa", "sUa", {}),
        ("auaua", "uaua", {LEADING_ASSISTANT: 1}),
        ("sauaU", "sua", {LEADING_ASSISTANT: 1, UNANSWERED_USER: 1}),
        ("uUa", "uUa", {}),
        ("uaUeua", "uaua", {EMPTY_ASSISTANT: 1}),
        ("uaae", "uaa", {EMPTY_ASSISTANT: 1}),
        ("xua", "ua", {EMPTY_SYSTEM: 1}),
        ("uas", "ua", {UNANSWERED_SYSTEM: 1}),
        ("u", "", {UNANSWERED_USER: 1, NO_ASSISTANT: 1}),
        ("ue", "", {EMPTY_ASSISTANT: 1, NO_ASSISTANT: 1}),
        ("a", "", {LEADING_ASSISTANT: 1, NO_ASSISTANT: 1}),
    ],
)
def test_cleaning_keeps_what_can_be_learnt_from_and_counts_the_rest(
    roles: str, kept: str, dropped: dict[str, int]
) -> None:
    """Catches answers without questions, questions without answers, and losses nobody counted.

    U is an empty user turn where it is kept; e an empty assistant turn, x an empty system turn.
    """
    make = {"s": ("system", "S"), "u": ("user", "q"), "U": ("user", " "), "a": ("assistant", "A")}
    make |= {"e": ("assistant", " \n"), "x": ("system", "")}
    counts: Counter[str] = Counter()
    messages = clean_messages([Message(role=make[c][0], content=make[c][1]) for c in roles], counts)  # type: ignore[arg-type]
    assert [m.role[0] for m in messages] == list(kept.lower())
    assert {k: v for k, v in counts.items() if v} == dropped


def test_report_counts_items_turns_and_losses(tmp_path: Path) -> None:
    """Catches a silent loss."""
    empty = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]}
    dialogues, report = read_dialogues(write(tmp_path / "x.jsonl", [SHAREGPT, empty, SHAREGPT]))
    assert (report.items, report.dialogues, report.assistant_turns, len(dialogues)) == (3, 2, 2, 2)
    assert report.dropped == {EMPTY_ASSISTANT: 1, NO_ASSISTANT: 1}
    assert "3 items, 2 dialogues" in str(report)
    assert len(load_dialogues(tmp_path / "x.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"messages": []}\n{"messages": [}', r"bad\.jsonl line 2 is malformed JSON"),
        ('{"prompt": "a", "chosen": "b"}', r"columns \['chosen', 'prompt'\]"),
        ("[1, 2]", r"item 1 is a int"),
        ('{"messages": 3}', r"'messages' is a int"),
        ('{"messages": [3]}', r"turn 1 is a int"),
        ('{"messages": [{"role": "user"}]}', r"turn 1 has the keys \['role'\]"),
        ('{"messages": [{"role": "user", "content": 5}]}', r"turn 1 has a content of type int"),
        (
            json.dumps(SHAREGPT) + '\n{"conversations": [{"from": "function_call", "value": "x"}]}',
            r"line 2 turn 1 has the unknown role 'function_call', known are system, .*assistant",
        ),
        ('{"messages": [{"role": null, "content": "x"}]}', r"unknown role None"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', r"half a surrogate pair"),
        ('{"conversations": [], "system": "\\ud800"}', r"line 1 'system' has half a surrogate pair"),
        ('{"conversations": [], "system": 3}', r"'system' has a content of type int"),
        ('{"text": "a", "category": "\\ud800"}', r"category has half a surrogate pair"),
        ("[" * 100_000, r"bad\.jsonl line 1 cannot be read as JSON: .*recursion"),
        ('{"text": "a"}\n{"text": ' + "[" * 100_000, r"line 2 cannot be read as JSON: .*recursion"),
        ('{"text": ' + "1" * 5000 + "}", r"line 1 cannot be read as JSON: .*4300 digits"),
        ('{"instruction": "a"}', r"alpaca needs 'instruction' and 'output'"),
        ('{"messages": []}', r"no dialogue to learn from"),
        ("", r"no dialogue to learn from"),
    ],
)
def test_bad_items_are_refused_with_place_and_reason(tmp_path: Path, text: str, said: str) -> None:
    """Catches a traceback, a skipped item, or a message that does not find the item again."""
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        load_dialogues(path)


def test_items_at_hand_are_read_as_a_file_of_them() -> None:
    items = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"text": "once"},
    ]
    dialogues, report = read_dialogues(items)
    assert [dialogue.plain for dialogue in dialogues] == [False, True]
    assert str(report).startswith("the items given (text): 2 items")
    with pytest.raises(DataError, match="item 1 turn 1 has the unknown role 'bot'"):
        load_dialogues([{"messages": [{"role": "bot", "content": ""}]}])
    with pytest.raises(ConfigError, match="a separator is for text files"):
        load_dialogues(items, separator="---")


@pytest.mark.parametrize(
    ("dialogues", "said"),
    [("train.jsonl", "got str"), ([{"messages": []}], "got dict"), ([], "there is no dialogue")],
)
def test_what_is_no_dialogue_is_refused_before_any_model_is_looked_for(
    dialogues: Any, said: str, tmp_path: Path
) -> None:
    """Catches the traceback of a path, or of rows of a file, that were not read."""
    with pytest.raises(DataError, match=said):
        fusechat.extract("no/model", dialogues, tmp_path / "store")


def test_bad_files_are_refused_with_the_mend(tmp_path: Path) -> None:
    """Catches tracebacks from the file system, UTF-8 and parquet."""
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        load_dialogues(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        load_dialogues("data/train.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": []}\n{"messages": "caf\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl line 2 is not UTF-8 \(byte 34\)"):
        load_dialogues(tmp_path / "latin.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="not a whole parquet file"):
        load_dialogues(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"unknown ending '.csv'"):
        load_dialogues(tmp_path / "x.csv")
    with pytest.raises(DataError, match="messages needs"):
        load_dialogues(write(tmp_path / "s.jsonl", [SHAREGPT]), format="messages")
    with pytest.raises(ConfigError, match="unknown data format 'chatml'"):
        load_dialogues(tmp_path / "s.jsonl", format="chatml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="separator is for text files"):
        load_dialogues(tmp_path / "s.jsonl", separator="---")


def test_data_sets_load_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hub id taken for a file, a split that is not passed on, and a traceback out of `datasets`."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [SHAREGPT] * 3)
    assert len(load_dialogues(folder, split="train[:2]")) == 2
    with pytest.raises(DataError, match="cannot load the data set"):
        load_dialogues(folder, split="missing")
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [SHAREGPT])
    assert len(load_dialogues("some-owner/some.set", split="test")) == 1
    assert asked == [("some-owner/some.set", "test")]


def test_running_text_is_split_at_the_separator_and_marked_plain(tmp_path: Path) -> None:
    """Catches documents glued together, empty ones kept, a byte order mark read as text, pieces encoded as wholes."""
    path = tmp_path / "stories.txt"
    path.write_bytes("\ufeffOne.\n<|end|>\n\n<|end|>\nTwo é.\n".encode())
    dialogues, report = read_dialogues(path, separator="<|end|>")
    assert [contents(d) for d in dialogues] == [[("assistant", "One.")], [("assistant", "Two é.")]]
    assert all(d.plain for d in dialogues)
    assert (report.format, report.items, report.dropped) == ("text", 2, {})
    pieces = load_dialogues(write(tmp_path / "t.jsonl", [{"text": "a b"}, {"text": "a"}]), max_bytes=1)
    assert [(d.messages[0].content, d.goes_on) for d in pieces] == [("a", True), ("b", False), ("a", False)]
    assert dataset_fingerprint(pieces[:1]) != dataset_fingerprint(pieces[2:])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab é😀\n", max_size=60), st.integers(min_value=1, max_value=12))
def test_cut_pieces_fit_and_lose_nothing_but_space(text: str, max_bytes: int) -> None:
    """Catches cut characters, lost words, pieces that are too long, and words cut although a space was near."""
    pieces = list(cut_text(text, max_bytes))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for piece in pieces:
        assert piece == piece.strip() != ""
        assert len(piece.encode()) <= max_bytes or len(piece) == 1
    # A word is only cut when it is too long on its own.
    if all(len(word.encode()) <= max_bytes for word in text.split()):
        assert [w for p in pieces for w in p.split()] == text.split()


def test_real_data(shared_data: Path) -> None:
    """Catches a layout that only our own examples have."""
    chat = shared_data / "chat"
    expected = {
        "fastchat/data/dummy_conversation.json": ("sharegpt", 500),
        "torchtune/alpaca_tiny.json": ("alpaca", None),
        "torchtune/chat_tiny.json": ("sharegpt", None),
        "llama_factory/identity.json": ("alpaca", None),
        "llama_factory/v1_sft_demo.jsonl": ("messages", None),
        "llama_factory/c4_demo.jsonl": ("text", None),
    }
    for name, (format, count) in expected.items():
        dialogues, report = read_dialogues(chat / name)
        assert report.format == format
        assert count is None or len(dialogues) == count
        assert all(any(m.role == "assistant" for m in d.messages) for d in dialogues)
    with pytest.raises(DataError, match="item 1 turn 4 has the unknown role 'function_call'"):
        load_dialogues(chat / "llama_factory" / "glaive_toolcall_en_demo.json")
    stories = load_dialogues(shared_data / "derived" / "tinystories_dev.txt", separator="<|endoftext|>", max_bytes=600)
    assert max(len(d.messages[0].content.encode()) for d in stories) <= 600


def test_keys_tell_dialogues_apart_by_content_only() -> None:
    """Catches a key that depends on the category, or that confuses where one message ends and the next begins."""
    assert dialogue_key(dialogue("a", "b")) == dialogue_key(dialogue("a", "b", category="x"))
    different = [dialogue("a", "b"), dialogue("ab", ""), dialogue("b", "a"), dialogue("a", "b", "a", "b")]
    assert len({dialogue_key(d) for d in different}) == len(different)
    assert re.fullmatch("[0-9a-f]{64}", dialogue_key(different[0]))
    assert dataset_fingerprint(different) != dataset_fingerprint(different[::-1])


def test_a_piece_and_a_whole_document_of_the_same_text_are_copies(tmp_path: Path) -> None:
    """Catches a held-out text that was trained on, where it is the first piece of a longer one."""
    texts = [{"text": text} for n in range(20) for text in (f"w{n} more", f"w{n}")]
    pieces = load_dialogues(write(tmp_path / "t.jsonl", texts), max_bytes=4)
    assert sum(d.goes_on for d in pieces) == 20
    for seed in range(3):
        fit, held = split_held_out(pieces, 0.4, seed)
        assert not {contents(d)[0] for d in fit} & {contents(d)[0] for d in held}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=12, max_size=60), st.integers(0, 5))
def test_split_is_deterministic_and_never_parts_copies(numbers: list[int], seed: int) -> None:
    """Catches leaks of held-out dialogues into the fit set, and a split that depends on the order."""
    dialogues = [dialogue(str(n), "answer") for n in numbers]
    if len(set(numbers)) < 5:
        return
    fit, held = split_held_out(dialogues, 0.25, seed)
    assert not {dialogue_key(d) for d in fit} & {dialogue_key(d) for d in held}
    assert sorted(map(dialogue_key, fit + held)) == sorted(map(dialogue_key, dialogues))
    again = split_held_out(dialogues[::-1], 0.25, seed)
    assert set(map(dialogue_key, again[1])) == set(map(dialogue_key, held))


def test_split_counts_seeds_and_refusals() -> None:
    """Catches a count read as a fraction, a seed that does nothing, and empty parts."""
    dialogues = [dialogue(str(n), "answer") for n in range(40)]
    fit, held = split_held_out(dialogues, 10, 0)
    assert (len(fit), len(held)) == (30, 10)
    assert split_held_out(dialogues, 0.25, 0)[1] == held
    assert split_held_out(dialogues, 10, 1)[1] != held
    for wrong in (0, 40, 0.001):
        with pytest.raises(ConfigError, match="cannot hold out"):
            split_held_out(dialogues, wrong, 0)
