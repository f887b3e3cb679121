"""What training is given: which distribution is taught where, and how it is batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusechat.align import RowKind
from fusechat.artifact import ShardedWriter, sha256_file
from fusechat.loss import mix_candidates
from fusechat.store import ALIGNED_FORMAT, TOPK_FORMAT, TOPK_VERSION, make_block, open_topk, write_block
from fusechat.train.collate import collate
from fusechat.train.dataset import Example, FusionDataset
from fusechat.train.select import Selection
from fusechat.train.source import open_source
from fusechat.train.targets import Targets, mixed

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
    cells = Targets.by(np.array([[50, 51, 52], [60, 61, 62]]), np.full((2, 3), -2.0), low, high)
    taught = row.filled(finer, cells)
    assert taught.ids.tolist() == [[0, 1, 0], [50, 51, 52], [4, 5, 0], [60, 61, 62]]
    assert taught.high.tolist() == [[0, 0, 0], [0, 9, 0], [0, 0, 0], [0, 4, 7]]
    assert np.isneginf(taught.logprobs).tolist() == [
        [False, False, True],
        [False] * 3,
        [False, False, True],
        [False] * 3,
    ]


def test_no_finer_row_at_all_changes_nothing() -> None:
    row = Targets.by(np.arange(4).reshape(2, 2), np.zeros((2, 2)))
    none = np.zeros(2, dtype=np.bool_)
    taught = row.filled(none, Targets.by(np.zeros((0, 3)), np.zeros((0, 3))))
    assert taught.ids[:, :2].tolist() == row.ids.tolist()


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
    wide = [t.widened(5) for t in parts]
    logprobs = torch.from_numpy(np.stack([t.logprobs for t in wide], 1)).float()
    ids = torch.from_numpy(np.stack([t.ids for t in wide], 1).astype(np.int64))
    ids = torch.where(logprobs > -torch.inf, ids, -1)
    _, theirs = mix_candidates(ids, logprobs, torch.from_numpy(weights.T.copy()), renormalise=renormalise)
    kept = np.r_[0:3, 5:10]  # without what `widened` added
    np.testing.assert_allclose(ours.logprobs, theirs.numpy()[:, kept], rtol=2e-6, atol=1e-6)
    assert (ours.ids == ids.flatten(1).numpy()[:, kept])[ours.logprobs > -np.inf].all()
