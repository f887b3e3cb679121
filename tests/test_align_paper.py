"""The research code's branches and its statistics: against cases worked by hand and plain loops."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.align import distribute, vocab_map
from fusechat.align.paper import ONE_HOT, branches
from fusechat.align.statistics import PairCounts, best_pairs, soft_pairs, upstream_pairs
from fusechat.align.vocabulary import Spelling
from fusechat.bench.align_baselines import plain_edit_distance
from fusechat.bytetable import ByteTable, Role
from fusechat.errors import ConfigError


@pytest.mark.parametrize(
    ("partners", "token", "expected"),
    [
        (["same"], "same", 0),
        (["ing"], "doing", 0),
        (["doing"], "ing", 0),
        (["do"], "doing", ONE_HOT),
        (["Ġdo"], "▁do", 0),
        ([""], "x", 0),
        (["a", "ab", "b"], "xb", 2),
        (["aa", "a"], "a", 0),
        (["inter", "nation", "al"], "internation", 1),
        (["inter", "x", "nation"], "internation", 2),
        (["ab", "cd"], "abcdx", ONE_HOT),
        (["q", "bc"], "aqbc", 1),
        (["x", "y"], "z", ONE_HOT),
        (["b", "cx"], "abcxd", ONE_HOT),
        (["ab", "c"], "bab", 0),
    ],
)
def test_branches(partners: list[str], token: str, expected: int) -> None:
    """Catches a branch taken in the wrong order, and marks compared where the rule removes them."""
    got = branches([list(range(len(partners)))], partners, [token], source_mark="Ġ", pivot_mark="▁")
    assert got.tolist() == [expected]


def test_distribute_keeps_the_first_of_colliding_candidates_and_marks_one_hot_rows() -> None:
    """Catches summed collisions, reordered candidates, and a one-hot row without its token."""
    got = distribute(
        [[0], [1], [1]],
        ["a", "b"],
        ["a", "x", "b"],
        source_mark="Ġ",
        pivot_mark="▁",
        target=np.array([5, 5, 7, -1]),
        ids=np.array([[1, 0, 2], [3, 2, 1]]),
        logprobs=np.log(np.array([[0.5, 0.3, 0.1], [0.5, 0.3, 0.1]])).astype(np.float16),
        next_ids=np.array([9, 8, 6]),
    )
    assert got.one_hot.tolist() == [False, True, False]
    assert got.ids.tolist() == [[5, 7, 0], [8, 0, 0], [7, 5, 0]]
    assert np.exp(got.logprobs.astype(float)) == pytest.approx(
        np.array([[0.5, 0.1, 0], [1, 0, 0], [0.3, 0.1, 0]]), abs=1e-3
    )


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), max_size=60)


@settings(deadline=None, max_examples=100)
@given(first=PAIRS, second=PAIRS, seed=st.integers(0, 2**32))
def test_statistics_are_the_plain_counts_and_scores(
    first: list[tuple[int, int]], second: list[tuple[int, int]], seed: int
) -> None:
    """Catches lost counts in a merge, wrong ties, shares that do not sum to 1, and the score with its sign mended."""
    rng = random.Random(seed)
    counts = no = PairCounts.of(np.empty(0, np.int64), np.empty(0, np.int64))
    for pairs in (first, second):
        counts += PairCounts.of(np.array([s for s, _ in pairs], int), np.array([p for _, p in pairs], int))
    plain = Counter(first + second)
    assert dict(zip(zip(counts.source.tolist(), counts.pivot.tolist()), counts.count.tolist())) == plain
    assert (counts + no).count.tolist() == counts.count.tolist()
    names = [["".join(rng.choices("ab▁Ġ", k=rng.randint(0, 4))) for _ in range(n)] for n in (7, 9)]
    partners: dict[int, list[int]] = defaultdict(list)
    for s, p in sorted(plain):
        partners[s].append(p)
    best = best_pairs(counts, *names, 7)
    upstream = upstream_pairs(counts, *names, source_mark="Ġ", pivot_mark="▁", size=7)
    target, weight = soft_pairs(counts, 7)

    def score(s: int, p: int) -> float:
        a, b = names[0][s].replace("Ġ", ""), names[1][p].replace("▁", "")
        if not a or not b:
            a, b = names[0][s].replace("Ġ", "▁"), names[1][p]
        distance = plain_edit_distance(a, b) * (0.1 if a in b or b in a else 1)
        return distance * (1 / (1 + math.exp(-plain[s, p])))

    for s in range(7):
        of = partners[s]
        key = {p: (-plain[s, p], plain_edit_distance(names[0][s], names[1][p]), p) for p in of}
        assert best[s] == (min(of, key=lambda p: key[p]) if of else -1)
        assert upstream[s] == (min(of, key=lambda p: (round(score(s, p), 12), p)) if of else -1)
        top = sorted(of, key=lambda p: (-plain[s, p], p))[:4]
        assert target[s].tolist() == top + [-1] * (4 - len(top))
        total = sum(plain[s, p] for p in top) or 1
        assert weight[s] == pytest.approx([plain[s, p] / total for p in top] + [0] * (4 - len(top)))


def table(*tokens: str) -> ByteTable:
    return ByteTable.from_tokens([t.encode() for t in tokens])


def test_maps_from_counts_put_byte_twins_first() -> None:
    """Catches a frequent pair that beats the twin, unseen tokens sent to an unknown token, and soft twins."""
    source, pivot = table("the", "internation", "zzz", "q"), table("the", "inter", "thx", "zz", "nation", "q")
    counts = PairCounts.of(np.array([0, 0, 1, 1, 1]), np.array([2, 2, 1, 1, 4]))
    hard = vocab_map(source, pivot, "ms", counts=counts)
    assert hard.target[:, 0].tolist() == [0, 1, 3, 5]  # zzz unseen: its longest prefix
    assert hard.quality.tolist() == [1, 2, 2, 1]
    soft = vocab_map(source, pivot, "ms-soft", counts=counts)
    assert soft.target.tolist() == [[0, -1, -1, -1], [1, 4, -1, -1], [3, -1, -1, -1], [5, -1, -1, -1]]
    assert soft.weight[1].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert (soft.weight.sum(axis=1) == 1).all()
    mined = vocab_map(source, pivot, "mined")
    assert mined.target[:, 0].tolist() == [0, 4, 3, 5]  # 5 edits to `nation`, 6 to `inter`


def test_the_research_codes_map() -> None:
    """Catches ends of sequences, unknown tokens and pieces under the other mark mapped otherwise than there."""
    source = Spelling(pieces=["<s>", "</e>", "Ġthe", "zz", "yy"], mark="Ġ", bos_id=0, eos_id=1)
    pivot = Spelling(pieces=["<unk>", "<b>", "</s>", "▁the", "zx"], mark="▁", bos_id=1, eos_id=2, unk_id=0)
    counts = PairCounts.of(np.array([3, 2]), np.array([4, 4]))
    tables = ByteTable.from_tokens([b""] * 5, [Role.TEXT] * 5), ByteTable.from_tokens([b""] * 5, [Role.TEXT] * 5)
    got = vocab_map(*tables, "ms-upstream", counts=counts, source_spelling=source, pivot_spelling=pivot)
    assert got.target[:, 0].tolist() == [1, 2, 3, 4, 0]
    with pytest.raises(ConfigError, match="needs `counts`"):
        vocab_map(*tables, "ms")
    with pytest.raises(ConfigError, match="spellings"):
        vocab_map(*tables, "ms-upstream", counts=counts)
