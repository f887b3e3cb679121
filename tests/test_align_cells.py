"""Prefix cells against sets of tokens collected one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align import vocab_map
from fusechat.align.cells import byte_order, cell_map
from fusechat.bytetable import ByteTable, Role

TOKENS = st.lists(
    st.binary(min_size=1, max_size=3) | st.sampled_from([b"\xff", b"\xff\xff", b"a"]), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=200)
@given(source=TOKENS, pivot=TOKENS, seed=st.integers(0, 99))
def test_a_range_is_the_tokens_that_begin_with_the_bytes(source: list[bytes], pivot: list[bytes], seed: int) -> None:
    """Catches ranges one too short or long, specials inside a range, and prefixes of 0xff bytes."""
    roles = [random.Random(seed + i).choice([Role.TEXT, Role.TEXT, Role.OTHER]) for i in range(len(pivot))]
    s, p = ByteTable.from_tokens(source), ByteTable.from_tokens(pivot, roles)
    order = byte_order(p)
    assert sorted(order.tolist()) == list(range(len(pivot)))
    texts = [pivot[i] for i in order if roles[i] == Role.TEXT]
    assert texts == sorted(texts)
    got = cell_map(s, p, order, vocab_map(s, p, "prefix").target[:, 0])
    for i, token in enumerate(source):
        want = {j for j, t in enumerate(pivot) if t.startswith(token) and roles[j] == Role.TEXT}
        assert set(order[got.low[i] : got.high[i]].tolist()) == want
    led = cell_map(s, p, order, got.target, pivot_lead=b"a")
    for i, token in enumerate(source):
        want = {j for j, t in enumerate(pivot) if t.startswith(b"a" + token) and roles[j] == Role.TEXT}
        assert set(order[led.low[i] : led.high[i]].tolist()) == want


def test_specials_have_no_range() -> None:
    """Catches an end of turn that owns every token."""
    s = ByteTable.from_tokens([b"</s>", b""], [Role.EOS, Role.ABSENT])
    p = ByteTable.from_tokens([b"<", b"</s>"], [Role.TEXT, Role.EOS])
    got = cell_map(s, p, byte_order(p), vocab_map(s, p).target[:, 0])
    assert (got.low == got.high).all()
    assert got.target.tolist() == [1, -1]
    assert byte_order(p).tolist() == [0, 1]
    assert pytest.approx(0) == np.abs(got.low).sum()
