"""What training is given: which distribution is taught where, and how it is batched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusechat.align import RowKind
from fusechat.align.cells import CellRows
from fusechat.artifact import ShardedWriter, sha256_file
from fusechat.loss import mix_candidates
from fusechat.store import ALIGNED_FORMAT, TOPK_FORMAT, TOPK_VERSION, make_block, open_topk, write_block
from fusechat.train.collate import collate
from fusechat.train.dataset import Example, FusionDataset
from fusechat.train.select import Selection
from fusechat.train.source import open_source
from fusechat.train.targets import Targets, mixed, picked

K = 2
INF = np.inf


def _pivot(folder: Path) -> Path:
    """Two dialogues of 5 tokens; tokens 2, 3 and 4 are the assistant's, so that rows 1, 2 and 3 are taught."""
    mask = np.array([0, 0, 1, 1, 1], dtype=bool)
    records = [
        {
            "dialogue.index": np.array([index]),
            "token.input_ids": np.arange(5, dtype=np.int32) + 10 * index,
            "token.loss_mask": mask,
            "row.ids": np.full((3, K), index, dtype=np.uint16),
            "row.logprobs": np.log(np.full((3, K), 0.25)).astype(np.float16),
        }
        for index in (0, 1)
    ]
    writer = ShardedWriter(folder / "pivot", {"format": TOPK_FORMAT, "version": TOPK_VERSION})
    writer.add("shard-00000.safetensors", lambda path: write_block(path, make_block(records)))
    writer.finish()
    return folder / "pivot"


def _aligned(folder: Path, pivot: Path, *, unaligned: str, source_nll: float = 1.0) -> Path:
    """In dialogue 0 the source is better per byte and worse per token; it lacks dialogue 1."""
    kinds = np.array([RowKind.SAME, RowKind.FINER, RowKind.NONE], dtype=np.uint8)
    logprobs = np.array([[-0.5, -1.0], [-0.7, -INF], [-INF, -INF]], dtype=np.float16)
    lacking = np.full((3, K), -INF, dtype=np.float16)
    records = [
        {
            "dialogue.index": np.array([index]),
            "dialogue.source_nll": np.array([nll], dtype=np.float32),
            "dialogue.pivot_nll": np.array([2.0], dtype=np.float32),
            "dialogue.source_tokens": np.array([2], dtype=np.int32),
            "dialogue.pivot_tokens": np.array([8], dtype=np.int32),
            "dialogue.content_bytes": np.array([9], dtype=np.int32),
            "row.ids": np.array([[7, 8], [3, 0], [0, 0]], dtype=np.uint16),
            "row.logprobs": rows,
            "row.kind": kind,
        }
        for index, nll, rows, kind in (
            (0, source_nll, logprobs, kinds),
            (1, np.nan, lacking, np.full(3, RowKind.NONE, dtype=np.uint8)),
        )
    ]
    request = {
        "format": ALIGNED_FORMAT,
        "version": 1,
        "unaligned": unaligned,
        "granularity": "chain",
        "pivot_store_sha256": sha256_file(pivot / "manifest.json"),
    }
    writer = ShardedWriter(folder / f"aligned-{unaligned}", request)
    writer.add("shard-00000.safetensors", lambda path: write_block(path, make_block(records)))
    writer.finish()
    return folder / f"aligned-{unaligned}"


def _dataset(folder: Path, unaligned: str = "skip", **options: Any) -> FusionDataset:
    pivot = _pivot(folder)
    return _fused(pivot, _aligned(folder, pivot, unaligned=unaligned), **options)


def _fused(pivot: Path, aligned: Path, when_pivot_wins: Any = "labels", **selection: Any) -> FusionDataset:
    store = open_topk(pivot)
    source = open_source(aligned, store, "source")
    return FusionDataset(store, [source], select=Selection(**selection), when_pivot_wins=when_pivot_wins)


def _from_source(dataset: FusionDataset) -> list[bool]:
    return [bool(weight == 1) for weight in dataset.weights[1]]


def test_source_rows_are_taught_where_the_source_wins(tmp_path: Path) -> None:
    example = _dataset(tmp_path)[0]
    assert example.rows.tolist() == [1, 2, 3]
    assert example.labels.tolist() == [-100, -100, 2, 3, 4]
    assert example.targets.ids.tolist() == [[7, 8], [3, 0], [0, 0]]
    assert np.isneginf(example.targets.logprobs).tolist() == [[False, False], [False, True], [True, True]]
    assert example.targets.partition.tolist() == [False, True, False]
    assert example.taught.tolist() == [1, 1, 0]


def test_a_dialogue_the_source_lacks_is_taught_by_its_labels_or_by_the_pivot(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "a", rule="source", when_pivot_wins="pivot")
    assert _from_source(dataset) == [True, False]
    assert dataset[1].targets.ids.tolist() == [[1, 1]] * 3
    assert dataset.source_share == 0.5
    labels_only = _dataset(tmp_path / "b", rule="source")[1]
    assert labels_only.targets.ids.shape == (3, 0)
    assert not labels_only.taught.any()


def test_min_ce_compares_per_byte_or_per_token_and_ties_go_to_the_pivot(tmp_path: Path) -> None:
    assert _from_source(_dataset(tmp_path / "a", ce_unit="byte"))[0]
    assert not _from_source(_dataset(tmp_path / "b", ce_unit="token"))[0]
    pivot = _pivot(tmp_path / "c")
    tied = _aligned(tmp_path / "c", pivot, unaligned="skip", source_nll=2.0)
    assert not _from_source(_fused(pivot, tied))[0]


def test_unaligned_rows_can_take_the_pivots_own_distribution(tmp_path: Path) -> None:
    example = _dataset(tmp_path, "pivot")[0]
    assert example.targets.ids[2].tolist() == [0, 0]
    np.testing.assert_allclose(np.exp(example.targets.logprobs[2]), 0.25, rtol=1e-3)
    assert example.taught.tolist() == [1, 1, 1]


def test_the_control_is_taught_nothing_but_its_labels(tmp_path: Path) -> None:
    example = FusionDataset(open_topk(_pivot(tmp_path)))[0]
    assert example.targets.ids.shape == (3, 0)
    assert not example.taught.any()


def test_batches_are_padded_and_rows_point_at_the_right_positions(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    control = FusionDataset(dataset.pivot)
    batch = collate([dataset[0], control[1]], pad_token_id=99)
    flat_labels = batch["labels"].flatten()
    assert flat_labels[batch["rows"] + 1].tolist() == [2, 3, 4, 12, 13, 14]
    assert batch["target_ids"].tolist() == [[7, 8], [3, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert bool(np.isneginf(batch["target_logprobs"][3:].numpy()).all())


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3, 4)])
def test_padding_goes_to_the_right_and_is_masked(lengths: tuple[int, ...]) -> None:
    examples = [
        Example(
            dialogue=0,
            input_ids=np.arange(n),
            labels=np.full(n, -100),
            rows=np.array([n - 2]),
            targets=Targets.by(np.zeros((1, n)), np.zeros((1, n))),
            taught=np.ones(1),
            row_weight=np.ones(1),
            origin=np.zeros(1, dtype=np.int64),
        )
        for n in lengths
    ]
    batch = collate(examples, pad_token_id=99)
    assert batch["attention_mask"].sum(dim=1).tolist() == list(lengths)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 99).all()
    assert batch["target_ids"].shape == (len(lengths), max(lengths))
    assert (batch["target_ids"] == 0).sum().item() == sum(lengths)


def test_finer_rows_take_their_ranges_from_the_cell_axis() -> None:
    """The n-th row of the cell axis belongs to the n-th finer row, whatever lies between them."""
    finer = np.array([False, True, False, True])
    row = Targets.by(np.arange(8).reshape(4, 2), np.full((4, 2), -1.0))
    low, high = np.array([[0, 5, 0], [0, 1, 2]]), np.array([[0, 9, 0], [0, 4, 7]])
    cells = CellRows(np.array([[50, 51, 52], [60, 61, 62]]), np.full((2, 3), -2.0), low, high)
    batch = collate([_example_of(row), _example_of(replace(row, partition=finer, cells=cells))], pad_token_id=0)
    coarse = [[0, 1, -1], [2, 3, -1], [4, 5, -1], [6, 7, -1]]
    assert batch["target_ids"].tolist() == [*coarse, coarse[0], [50, 51, 52], coarse[2], [60, 61, 62]]
    assert batch["target_logprobs"][5].tolist() == [-2.0] * 3
    assert batch["partition"].tolist() == [False] * 4 + finer.tolist()
    assert batch["target_low"].tolist() == [[0] * 3] * 5 + [[0, 5, 0], [0] * 3, [0, 1, 2]]
    assert batch["target_high"].tolist() == [[0] * 3] * 5 + [[0, 9, 0], [0] * 3, [0, 4, 7]]


def _example_of(targets: Targets) -> Example:
    n = len(targets)
    return Example(
        dialogue=0,
        input_ids=np.arange(n + 1),
        labels=np.arange(n + 1),
        rows=np.arange(n),
        targets=targets,
        taught=np.ones(n),
        row_weight=np.ones(n),
        origin=np.zeros(n, dtype=np.int64),
    )


def test_cells_may_be_fewer_than_a_rows_entries() -> None:
    row = Targets.by(np.arange(6).reshape(2, 3), np.zeros((2, 3)))
    one = np.array([[9]])
    cells = CellRows(one, np.array([[-1.0]]), one - 9, one)
    batch = collate([_example_of(replace(row, partition=np.array([False, True]), cells=cells))], pad_token_id=0)
    assert batch["target_ids"].tolist() == [[0, 1, 2], [9, -1, -1]]
    assert batch["target_high"].tolist() == [[0, 0, 0], [9, 0, 0]]


def test_rows_keep_their_entries_and_ranges_wherever_they_go() -> None:
    """Every operation against rows written out one by one."""
    rng = np.random.default_rng(0)
    n = 30

    def rows_of(targets: Targets) -> list[tuple[Any, ...]]:
        rows, cell_row = [], 0
        for r, partition in enumerate(targets.partition.tolist()):
            columns = [targets.ids[r], targets.logprobs[r], np.zeros(targets.width), np.zeros(targets.width)]
            if partition and targets.cells is not None:
                columns, cell_row = [column[cell_row] for column in targets.cells], cell_row + 1
            entries = zip(*(column.tolist() for column in columns))
            rows.append((partition, [entry for entry in entries if entry[1] > -INF]))
        assert targets.cells is None or {len(column) for column in targets.cells} == {cell_row}
        assert targets.present().tolist() == [bool(entries) for _, entries in rows]
        return rows

    for _ in range(30):
        parts = []
        for width, cell_width in rng.integers(1, 7, (3, 2)).tolist():
            part = Targets.by(rng.integers(0, 99, (n, width)).astype(np.uint16), rng.normal(size=(n, width)))
            finer = rng.random(n) < rng.choice([0.0, 0.3])
            shape = int(finer.sum()), cell_width
            if rng.random() < 0.7:
                ids, low, high = rng.integers(0, 99, (3, *shape)).astype(np.int32)
                part = replace(part, partition=finer, cells=CellRows(ids, rng.normal(size=shape), low, high))
            parts.append(part)
        written = [rows_of(part) for part in parts]
        which, rows, gone = rng.integers(0, 3, n), rng.integers(0, n, n), rng.random(n) < 0.5
        assert rows_of(picked(parts, which)) == [written[c][r] for r, c in enumerate(which)]
        assert rows_of(parts[0].taken(rows)) == [written[0][r] for r in rows]
        assert rows_of(parts[0].without(gone)) == [(False, []) if g else row for g, row in zip(gone, written[0])]


@pytest.mark.parametrize("renormalise", [False, True])
def test_mixtures_are_those_of_the_loss(renormalise: bool) -> None:
    """The data path mixes in half precision as `mix_candidates` does on the device."""
    rng = np.random.default_rng(0)
    n_rows, widths = 40, (3, 5)
    parts = []
    for width in widths:
        logprobs = np.log(rng.dirichlet(np.ones(width + 1), n_rows)[:, :width]).astype(np.float16)
        logprobs[rng.random(logprobs.shape) < 0.2] = -np.inf
        logprobs[rng.random(n_rows) < 0.1] = -np.inf
        parts.append(Targets.by(rng.integers(0, 99, (n_rows, width)).astype(np.uint16), logprobs))
    weights = rng.dirichlet(np.ones(2), n_rows).T.astype(np.float32)
    weights[:, rng.random(n_rows) < 0.2] = [[0.0], [1.0]]
    ours = mixed(parts, weights, renormalise=renormalise)
    wide = [np.pad(t.logprobs, ((0, 0), (0, 5 - t.width)), constant_values=-np.inf) for t in parts]
    logprobs = torch.from_numpy(np.stack(wide, 1)).float()
    ids = torch.from_numpy(np.stack([np.pad(t.ids, ((0, 0), (0, 5 - t.width))) for t in parts], 1).astype(np.int64))
    ids = torch.where(logprobs > -torch.inf, ids, -1)
    _, theirs = mix_candidates(ids, logprobs, torch.from_numpy(weights.T.copy()), renormalise=renormalise)
    kept = np.r_[0:3, 5:10]  # without the padding
    np.testing.assert_allclose(ours.logprobs, theirs.numpy()[:, kept], rtol=2e-6, atol=1e-6)
    assert (ours.ids == ids.flatten(1).numpy()[:, kept])[ours.logprobs > -np.inf].all()
