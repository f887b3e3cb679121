"""Matching and remapping of rows: both engines against slow references, on random texts in random tokenizations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from aligned_rows import views
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_alignment import as_tuples, slow_match

from fusechat.align import RowKind
from fusechat.align.rows import RowView, match_rows
from fusechat.bytetable import ByteTable, token_byte_ends
from fusechat.demo.tokenizers import KINDS
from fusechat.encode import encode_all
from fusechat.errors import FormatError
from fusechat.records import Dialogue, Message
from fusechat.store import Block, make_block
from fusechat.template import load_template


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_matching_is_the_search_through_all_rows(seed: int) -> None:
    """Catches a pointer that runs past a boundary, end tokens paired with text, chains that stop short or overrun."""
    pivot, source, partner = views(seed)
    slow = slow_match(pivot, source, partner)
    for choice in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSECHAT_NATIVE", choice)
            for threads in (1, 3):
                assert as_tuples(match_rows(pivot, source, partner, threads)) == slow


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_matched_rows_share_their_prefix(seed: int) -> None:
    """Catches any pair whose models have not read the same bytes of the same message (the rule alignment stands on)."""
    pivot, source, partner = views(seed)
    matches = match_rows(pivot, source, partner)
    hit = matches.source_row >= 0
    s = matches.source_row[hit]
    assert (pivot.turn[hit] == source.turn[s]).all()
    assert (pivot.starts[hit] == source.starts[s]).all()
    assert (hit == (matches.kind != RowKind.NONE)).all()


def test_offsets_that_lie_are_refused(backend: str) -> None:
    """Catches row offsets that are not the loss mask's, which would write over other dialogues' rows."""
    pivot, source, partner = views(3)
    wrong = dict(pivot.block.offsets)
    wrong["row"] = np.concatenate([wrong["row"][:-1], wrong["row"][-1:] - 1])
    lying = RowView.of(Block(columns=pivot.block.columns, offsets=wrong), pivot.table)
    with pytest.raises(ValueError, match="loss mask"):
        match_rows(lying, source, partner)


def test_the_end_of_a_turn_has_no_width_where_a_template_trims(backend: str) -> None:
    """Catches a source's end of turn matched with the line break that its template trimmed and the pivot's kept."""
    dialogue = Dialogue(messages=(Message(role="user", content="Say hi"), Message(role="assistant", content="Hi.\n")))
    sides = []
    for kind in ("byte_level_bpe", "byte_level_with_headers"):
        tokenizer = KINDS[kind](["Say hi", "Hi there.", "user assistant"], 330)
        table = ByteTable.from_tokenizer(tokenizer)
        template = load_template(tokenizer)
        one = encode_all([dialogue], tokenizer, table, template=template, max_length_tokens=None).encoded[0]
        record = {"dialogue.index": np.array([0]), "row.ids": np.zeros((one.loss_mask[1:].sum(), 1), np.uint16)}
        record |= {f"token.{name}": getattr(one, name) for name in ("input_ids", "loss_mask", "turn", "byte_end")}
        sides.append(RowView.of(make_block([record]), table))
    pivot, source = sides
    assert pivot.at_end.tolist() == [False] * (len(pivot.gold) - 1) + [True]
    assert source.at_end.tolist() == [False] * (len(source.gold) - 1) + [True]
    assert (pivot.ends[-1], source.ends[-1]) == (4, 3)
    # Behind "Hi." the pivot writes on, and behind the line break the source has nothing to say.
    assert match_rows(pivot, source, np.array([0])).kind[-2:].tolist() == [RowKind.NONE, RowKind.NONE]


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    """Catches a store read with another model's tokenizer."""
    pivot, _, _ = views(3)
    with pytest.raises(FormatError, match="outside its vocabulary of 1"):
        RowView.of(pivot.block, ByteTable.from_tokens([b"a"]))


@pytest.mark.parametrize("pair", [("openchat-3.5-exact", "gpt2"), ("openchat-3.5", "openchat-3.5-exact")])
def test_real_tokenizers_match_where_their_bytes_do(shared_data: Path, pair: tuple[str, str]) -> None:
    """Catches a match between two real tokenizations whose texts so far differ, and a match that is missed."""
    from transformers import AutoTokenizer

    chapters = [shared_data / "text" / "parallel_hf_course" / lang / "chapter1" / "3.mdx" for lang in ("en", "zh-CN")]
    text = "\n".join(path.read_text(encoding="utf-8")[:3000] for path in chapters if path.exists())
    sides = []
    for name in pair:
        tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
        table = ByteTable.from_tokenizer(tokenizer)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ends = token_byte_ends(table, ids, text.encode())
        n = len(ids)
        record = {
            "dialogue.index": np.array([0]),
            "token.input_ids": np.array(ids, np.int32),
            "token.loss_mask": np.ones(n, bool),
            "token.turn": np.zeros(n, np.int32),
            "token.byte_end": ends.astype(np.int32),
            "row.ids": np.zeros((n - 1, 1), np.int32),
        }
        sides.append((RowView.of(make_block([record]), table), ends))
    (pivot, pivot_ends), (source, source_ends) = sides
    kinds = match_rows(pivot, source, np.array([0])).kind
    assert ((kinds != RowKind.NONE) == np.isin(pivot_ends[:-1], source_ends[:-1])).all()
    assert 0.5 < (kinds != RowKind.NONE).mean() < 1
