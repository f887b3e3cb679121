"""Filling vLLM's flat lists by extending them: the same lists, and vLLM's own method where it does anything else."""

from __future__ import annotations

import sys
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusechat.extract.flat_lists import extended_lists


class Lists:
    """Entry by entry, as vLLM 0.32 fills them."""

    def __init__(self) -> None:
        self.start_indices: list[int] = []
        self.end_indices: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int | None] = []
        self.decoded_tokens: list[str | None] = []

    def append_fast(self, token_ids: Any, logprobs: Any, ranks: Any, decoded_tokens: Any) -> None:
        self.start_indices.append(len(self.logprobs))
        for token, logprob, rank, text in zip(token_ids, logprobs, ranks, decoded_tokens):
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.ranks.append(rank)
            self.decoded_tokens.append(text)
        self.end_indices.append(len(self.logprobs))


class Others(Lists):
    """What another version might do."""

    def append_fast(self, token_ids: Any, logprobs: Any, ranks: Any, decoded_tokens: Any) -> None:
        super().append_fast(token_ids, [-x for x in logprobs], ranks, decoded_tokens)


class Fewer:
    """A class without the lists."""

    def append_fast(self, token_ids: Any, logprobs: Any, ranks: Any, decoded_tokens: Any) -> None:
        self.everything = list(zip(token_ids, logprobs))


def _fill(lists: Any, rng: np.random.Generator) -> None:
    for k in (1, 10, 64, 3):
        ids, logprobs = rng.integers(0, 99, k + 1).tolist(), rng.random(k + 1).tolist()
        texts: Any = repeat(None) if k > 3 else ["a"] * (k + 1)
        lists.append_fast(ids, logprobs, chain((7,), range(1, k + 1)), texts)
        lists.append_fast(ids, logprobs, chain((7,), range(1, k + 9)), iter(["b"] * 99))


def test_the_lists_are_those_of_appending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.logprobs", SimpleNamespace(FlatLogprobs=Lists))
    appended, extended = Lists(), Lists()
    _fill(appended, np.random.default_rng(0))
    original = Lists.append_fast
    with extended_lists() as replaced:
        assert replaced
        assert Lists.append_fast is not original
        _fill(extended, np.random.default_rng(0))
    assert Lists.append_fast is original
    assert vars(extended) == vars(appended)


@pytest.mark.parametrize("kind", [Others, Fewer, object, None])
def test_another_vllm_keeps_its_own_method(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.logprobs", kind and SimpleNamespace(FlatLogprobs=kind))
    before = getattr(kind, "append_fast", None)
    with extended_lists() as replaced:
        assert not replaced
        assert getattr(kind, "append_fast", None) is before
