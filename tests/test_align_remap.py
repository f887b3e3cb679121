"""Remapping of rows: both engines against the sum of probabilities written out."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from aligned_rows import views
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_alignment import slow_remap

from fusechat.align import RowKind
from fusechat.align.rows import Choices, Matches, Remapped, RowView, match_rows, remap_rows
from fusechat.align.vocabulary import VocabMap, stack_maps
from fusechat.bytetable import ByteTable
from fusechat.store import Block, make_block


def random_map(rng: random.Random, source: ByteTable, pivot: ByteTable, width: int) -> VocabMap:
    target = np.full((len(source), width), -1, np.int32)
    weight = np.zeros((len(source), width), np.float32)
    for i in range(len(source)):
        n = rng.choice([0, 1, min(width, len(pivot))])
        target[i, :n] = rng.sample(range(len(pivot)), n)
        weight[i, :n] = np.array([rng.uniform(0.1, 1) for _ in range(n)])
        weight[i] /= weight[i].sum() or 1
    quality = np.where(target[:, 0] < 0, 0, [rng.choice([1, 2]) for _ in range(len(source))])
    return VocabMap(target=target, weight=weight, quality=quality.astype(np.uint8))


def one_target(target: np.ndarray) -> VocabMap:
    shape = (1, len(target), 1)
    return VocabMap(
        target=target.astype(np.int32).reshape(shape),
        weight=np.ones(shape, np.float32),
        quality=np.ones(shape[:2], np.uint8),
    )


CHOICES = [
    Choices(granularity=g, unaligned=u, collisions=c)
    for g, u, c in [("chain", "gold", "sum"), ("first", "skip", "first"), ("gold", "pivot", "sum")]
]


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**32), choices=st.sampled_from(CHOICES))
def test_remapping_is_the_sum_of_probabilities(seed: int, choices: Choices) -> None:
    """Catches lost or doubled mass, wrong gold rules, wrong chains, and any difference between the two engines."""
    rng = random.Random(seed)
    pivot, source, partner = views(seed, k=rng.choice([1, 4, 7]))
    width = rng.choice([1, 1, 3])
    maps = stack_maps([random_map(rng, source.table, pivot.table, rng.choice([1, width])) for _ in range(2)])
    results = []
    for choice in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSECHAT_NATIVE", choice)
            matches = match_rows(pivot, source, partner)
            index = np.array([rng.randrange(2) for _ in matches.kind], np.int16) if not results else index  # noqa: F821
            results.append(remap_rows(matches, pivot, source, index, maps, choices, 2))
    rows, golds, mass, lost = slow_remap(matches, pivot, source, index, maps, choices)
    for got in results:
        assert got.ids.dtype == np.uint16
        values = got.logprobs.astype(np.float64)
        assert (np.diff(np.where(np.isinf(values), -1e9, values), axis=1) <= 0).all() or choices.collisions == "first"
        for r, row in enumerate(rows):
            present = ~np.isinf(values[r])
            assert (
                len(set(got.ids[r][present].tolist()))
                == present.sum()
                == min(len(row), source.block["row.ids"].shape[1])
            )
            dropped = sorted(row.values(), reverse=True)[present.sum() :]
            assert (
                not dropped or math.log(dropped[0]) <= values[r][present].min() + 2e-3 or choices.collisions == "first"
            )
            assert not got.ids[r][~present].any()
            for token, logprob in zip(got.ids[r][present].tolist(), values[r][present]):
                assert logprob == pytest.approx(min(math.log(row[token]), 0), abs=2e-3, rel=2e-3)
        assert got.gold_logprob == pytest.approx(np.array(golds), abs=1e-4, nan_ok=True)
        assert got.mass / 2**30 == pytest.approx(mass, abs=1e-5)
        assert got.lost / 2**30 == pytest.approx(lost, abs=1e-5)
    same(results[0], results[1])


def same(a: Remapped, b: Remapped) -> None:
    """Both engines agree to the last bit of what is stored, and on the order of what is stored alike."""
    assert (a.ids == b.ids).all()
    assert (a.logprobs.view(np.uint16) == b.logprobs.view(np.uint16)).all()
    assert (a.mass == b.mass).all()
    assert (a.lost == b.lost).all()
    assert a.gold_logprob == pytest.approx(b.gold_logprob, abs=1e-6, nan_ok=True)


def test_stored_values_come_through_bit_for_bit(backend: str) -> None:
    """Catches a detour through exp and log for candidates that collide with nothing."""
    _, source, _ = views(5, k=4)
    n = len(source.gold)
    matches = Matches(
        kind=np.zeros(n, np.uint8),
        source_row=np.arange(n),
        chain=np.ones(n, np.int32),
        rest_bytes=np.zeros(n, np.int32),
    )
    twin = RowView.of(source.block, source.table)
    got = remap_rows(matches, twin, source, np.zeros(n, np.int16), one_target(np.arange(len(source.table))), CHOICES[0])
    assert (got.logprobs == source.block["row.logprobs"]).all()
    assert (got.ids == source.block["row.ids"]).all()
    assert (got.gold_logprob == source.block["row.gold_logprob"]).all()


def test_subnormal_and_tiny_sums_round_to_the_nearest_half(backend: str) -> None:
    """Catches a half-precision conversion that truncates, or fails below 2^-14."""
    table = ByteTable.from_tokens([b"a", b"b"])
    logs = np.array([[math.log(p), math.log(1 - p - d)] for p in (0.5, 0.8, 1e-4) for d in (0, 1e-7, 1e-5, 3e-4, 0.1)])
    record = {
        "dialogue.index": np.array([0]),
        "token.input_ids": np.zeros(len(logs) + 1, np.int32),
        "token.loss_mask": np.ones(len(logs) + 1, bool),
        "token.turn": np.zeros(len(logs) + 1, np.int32),
        "token.byte_end": np.arange(1, len(logs) + 2, dtype=np.int32),
        "row.ids": np.tile(np.array([[0, 1]], np.uint16), (len(logs), 1)),
        "row.logprobs": logs.astype(np.float16),
        "row.gold_logprob": logs[:, 0].astype(np.float32),
    }
    view = RowView.of(make_block([record]), table)
    matches = match_rows(view, view, np.array([0]))
    got = remap_rows(matches, view, view, np.zeros(len(logs), np.int16), one_target(np.zeros(2)), CHOICES[0])
    total = np.exp(logs.astype(np.float16).astype(np.float64)).sum(axis=1)
    want = np.minimum(np.log(total), 0).astype(np.float32).astype(np.float16)
    assert np.abs(got.logprobs[:, 0].astype(float) - want.astype(float)).max() <= 2.0**-24
    assert np.isneginf(got.logprobs[:, 1]).all()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"row.ids": 60_000}, "source token 60000"),
        ({"row.logprobs": np.nan}, "NaN or positive|is NaN"),
        ({"row.logprobs": 0.5}, "positive"),
    ],
)
def test_hostile_rows_are_refused(backend: str, damage: dict[str, Any], named: str) -> None:
    """Catches reads outside a map and NaN taken for a probability."""
    pivot, source, partner = views(3)
    matches = match_rows(pivot, source, partner)
    assert (matches.kind == RowKind.SAME).any()
    columns = dict(source.block.columns)
    for key, value in damage.items():
        columns[key] = columns[key].astype(np.uint16) if key == "row.ids" else columns[key].copy()
        columns[key][:, 0] = value
    hostile = RowView.of(Block(columns=columns, offsets=source.block.offsets), source.table)
    maps, index = one_target(np.zeros(len(source.table))), np.zeros(len(matches.kind), np.int16)
    outside = one_target(np.full(len(source.table), 9999))
    with pytest.raises(ValueError, match=named):
        remap_rows(matches, pivot, hostile, index, maps, CHOICES[1])
    with pytest.raises(ValueError, match="map entry"):
        remap_rows(matches, pivot, source, index, outside, CHOICES[0])
    with pytest.raises(ValueError, match="map 7"):
        remap_rows(matches, pivot, source, index + 7, maps, CHOICES[0])
