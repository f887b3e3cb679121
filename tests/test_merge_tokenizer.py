"""What a merge makes of the models' tokenizers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from merge_family import make_family, recipe

from fusechat.errors import ConfigError, FormatError, MismatchError
from fusechat.merge import merge
from fusechat.merge.verify import verify


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and three targets in different dtypes and shardings."""
    return make_family(tmp_path)


def write_tokenizer(model: Path, *added: str, unigram: bool = False) -> None:
    """Put a tokenizer.json into a model's directory: two tokens of its vocabulary, and added ones."""
    vocab: Any = [["a", -1.0], ["b", -2.0]] if unigram else {"a": 0, "b": 1}
    tokens = [{"id": 2 + i, "content": content} for i, content in enumerate(added)]
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens}))


def test_rows_of_different_tokens_are_told_and_where_a_tokenizer_is_named_refused(
    family: dict[str, Path], tmp_path: Path
) -> None:
    """Catches `<|im_end|>` of one model averaged with `<|end_of_turn|>` of another, which have one row, silently."""
    for name, path in family.items():
        write_tokenizer(path, "<s>", *["<|im_end|>"] * (name != "c"), unigram=name == "b")
    assert not any("token 3 is" in warning for warning in merge(recipe(family), tmp_path / "one")["warnings"])
    write_tokenizer(family["b"], "<s>", "<|end_of_turn|>", "<|more|>", unigram=True)
    warning = rf"token 3 is '<\|end_of_turn\|>' in {family['b']} and '<\|im_end\|>' in the base"
    told = merge(recipe(family), tmp_path / "two")["warnings"]
    assert any(re.search(warning, line) for line in told)
    assert told == json.loads((tmp_path / "two" / "provenance.json").read_text())["warnings"]
    for given in ({"tokenizer_source": "base"}, {"tokenizer": {"source": str(family["a"])}}):
        with pytest.raises(ConfigError, match=warning + ".*rows are merged by number"):
            merge(recipe(family, **given), tmp_path / "bad")
    del family["b"], family["c"]
    merge(recipe(family, "linear", tokenizer_source="base"), tmp_path / "three")
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, "<s>", "<|eot|>")
    with pytest.raises(ConfigError, match=r"token 3 is '<\|eot\|>' in .*other"):
        merge(recipe(family, "linear", tokenizer_source=str(other)), tmp_path / "bad")


def test_a_file_that_is_no_tokenizer_is_one_line(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a traceback for a broken tokenizer.json, when the weights are all that is asked for."""
    for text in ("[]", '{"model": [], "added_tokens": []}', '{"added_tokens": [3]}', '{"model": {"vocab": [3]}}'):
        (family["a"] / "tokenizer.json").write_text(text)
        with pytest.raises(FormatError, match=r"a/tokenizer\.json is no definition of a tokenizer"):
            merge(recipe(family), tmp_path / "out")


def test_another_chat_template(family: dict[str, Path], tmp_path: Path) -> None:
    """Catches a template that is read and not written, or that stands beside the one it replaces."""
    (family["base"] / "tokenizer_config.json").write_text('{"eos_token": "x", "chat_template": "{{ old }}"}')
    (family["base"] / "chat_template.json").write_text('{"chat_template": "{{ old }}"}')
    (tmp_path / "new.jinja").write_text("{{ new }}")
    given = {"auto": "{{ messages }}", "{{ new }}": "{{ new }}", str(tmp_path / "new.jinja"): "{{ new }}"}
    for i, (value, expected) in enumerate(given.items()):
        out = tmp_path / f"out{i}"
        merge(recipe(family, chat_template=value), out)
        assert (out / "chat_template.jinja").read_text() == expected
        kept = value == "auto"
        assert ("chat_template" in json.loads((out / "tokenizer_config.json").read_text())) == kept
        assert (out / "chat_template.json").exists() == kept
        verify(out)
    with pytest.raises(MismatchError, match="chat_template"):
        merge(recipe(family, chat_template="{{ newer }}"), tmp_path / "out1")
