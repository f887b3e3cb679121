"""The align stage from store to store: identity, resuming, threads, coverage, and inputs that do not fit together."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aligned_stores import TEXTS, byte_level, sentencepiece, write_store
from tokenizers import Tokenizer
from typer.testing import CliRunner

import fusechat
from fusechat.align import RowKind, distribute, dtw, read_byte_order, read_coverage, vocab_map
from fusechat.align.paper import branches
from fusechat.align.rows import RowView
from fusechat.align.shards import ShardWork, Task
from fusechat.align.stage import PRESETS
from fusechat.align.statistics import PairCounts
from fusechat.align.tokenizer import store_vocabulary
from fusechat.align.vocabulary import end_by_role
from fusechat.artifact import MANIFEST, Json, sha256_file
from fusechat.cli import app
from fusechat.errors import ConfigError, FormatError, FusechatError, MismatchError
from fusechat.inspect import describe
from fusechat.store import open_aligned, open_topk


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    return byte_level(TEXTS, 330), sentencepiece(TEXTS, 360)


@pytest.fixture
def stores(tmp_path: Path, tokenizers: tuple[Tokenizer, Tokenizer]) -> tuple[Path, Path]:
    pivot = write_store(tmp_path / "pivot", tokenizers[0], k=4, per_shard=4, seed=1)
    source = write_store(tmp_path / "source", tokenizers[1], k=6, per_shard=3, seed=2, skip=(3, 8))
    return pivot, source


def checksums(directory: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted(directory.iterdir())}


def test_a_store_aligned_to_itself_is_itself(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches any change to rows that need none."""
    manifest = fusechat.align(stores[0], stores[0], tmp_path / "out")
    pivot, aligned = open_topk(stores[0]), open_aligned(tmp_path / "out")
    assert manifest["coverage"]["rows"]["same"] == 1.0
    assert len(aligned) == len(TEXTS)
    for index in pivot:
        a, p = aligned[index], pivot[index]
        assert (a["row.ids"] == p["row.ids"]).all()
        assert (a["row.logprobs"] == p["row.logprobs"]).all()
        assert (a["row.gold_logprob"] == p["row.gold_logprob"]).all()
        assert a["dialogue.source_nll"] == a["dialogue.pivot_nll"]
        assert a["dialogue.source_nll"][0] == pytest.approx(-p["row.gold_logprob"].sum(), rel=1e-6)
        assert a["dialogue.content_bytes"][0] == len(TEXTS[index].encode())
        assert a["dialogue.source_tokens"][0] == len(p["row.ids"])


def test_rows_between_two_tokenizers(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches rows at the wrong position, skipped dialogues misplaced, and per-dialogue sums of other dialogues."""
    fusechat.align(stores[0], stores[1], tmp_path / "out")
    pivot, source, aligned = open_topk(stores[0]), open_topk(stores[1]), open_aligned(tmp_path / "out")
    seen = set()
    for index in pivot:
        a = aligned[index]
        gold = pivot[index]["token.input_ids"][1:]
        assert len(a["row.kind"]) == len(gold)
        seen |= set(a["row.kind"].tolist())
        if index not in source:
            assert (a["row.kind"] == RowKind.NONE).all()
            assert np.isnan(a["dialogue.source_nll"][0])
            assert a["dialogue.source_tokens"][0] == 0
        else:
            s = source[index]
            assert a["dialogue.source_nll"][0] == pytest.approx(-s["row.gold_logprob"].sum(), rel=1e-6)
            assert a["dialogue.source_tokens"][0] == len(s["row.ids"])
            assert a["row.kind"][-1] == RowKind.SAME  # the end of the turn
            assert a["row.gold_logprob"][-1] == s["row.gold_logprob"][-1]
        one_hot = np.isin(a["row.kind"], (RowKind.NONE, RowKind.FINER))
        assert (a["row.ids"][one_hot, 0] == gold[one_hot]).all()
        assert np.isneginf(a["row.logprobs"][one_hot, 1:]).all()
        assert np.isnan(a["row.gold_logprob"]).tolist() == (a["row.kind"] == RowKind.NONE).tolist()
        aligned_rows = a["row.kind"] != RowKind.NONE
        assert (
            np.where(a["row.ids"] == gold[:, None], a["row.logprobs"], -np.inf).max(axis=1)[aligned_rows] > -20
        ).all()
        assert (np.exp(a["row.logprobs"].astype(float)).sum(axis=1) <= 1.01).all()
    assert seen == set(RowKind)


def test_output_is_the_same_for_any_workers_and_after_an_interruption(
    tmp_path: Path, stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches sums that depend on threads or shards, and a resumed run that differs from an uninterrupted one."""
    fusechat.align(*stores, tmp_path / "one", workers=1)
    fusechat.align(*stores, tmp_path / "three", workers=3)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "three")
    calls: list[tuple[int, int]] = []

    def killed(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusechat.align(*stores, tmp_path / "killed", progress=killed)
    assert not (tmp_path / "killed" / MANIFEST).exists()
    with pytest.raises(FormatError, match="not a complete artefact"):
        open_aligned(tmp_path / "killed")
    first = (tmp_path / "killed" / "shard-00000.safetensors").stat().st_mtime_ns
    progress: list[tuple[int, int]] = []
    fusechat.align(*stores, tmp_path / "killed", progress=lambda *done: progress.append(done))
    assert (tmp_path / "killed" / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "one")
    assert progress[-1][0] == progress[-1][1] == calls[0][1]
    again = fusechat.align(*stores, tmp_path / "killed", progress=lambda *done: pytest.fail("nothing is left to do"))
    assert again["shards"]


def test_both_backends_write_the_same_store(
    tmp_path: Path, stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fallback that drifts from the compiled engine."""
    pytest.importorskip("fusechat._native", reason="the compiled engine is not built")
    for choice in ("require", "off"):
        monkeypatch.setenv("FUSECHAT_NATIVE", choice)
        fusechat.align(*stores, tmp_path / choice)
    native, numba = open_aligned(tmp_path / "require"), open_aligned(tmp_path / "off")
    for index in native:
        for key, values in native[index].items():
            if key.endswith("nll") or key == "row.gold_logprob":  # float32 sums of logarithms
                np.testing.assert_allclose(values, numba[index][key], rtol=1e-6)
            else:
                np.testing.assert_array_equal(values, numba[index][key], err_msg=key)
    assert read_coverage(tmp_path / "require") == read_coverage(tmp_path / "off")


def test_coverage_adds_up(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches shares that are not shares, and lost tokens that are not named."""
    manifest = fusechat.align(*stores, tmp_path / "out", vocab="exact")
    report = read_coverage(tmp_path / "out")
    aligned = open_aligned(tmp_path / "out")
    kinds = np.concatenate([aligned[i]["row.kind"] for i in aligned])
    for kind in RowKind:
        assert report["rows"][kind.name.lower()] == pytest.approx((kinds == kind).mean())
    assert sum(report["mass"].values()) == pytest.approx(1)
    assert report["mass"]["lost"] > 0
    assert report["lost_tokens"][0]["share"] <= 1
    assert report["examples"]
    assert manifest["coverage"]["mass"] == report["mass"]
    softer = fusechat.align(*stores, tmp_path / "prefix")["coverage"]["mass"]
    assert softer["lost"] < report["mass"]["lost"]


def test_cells_partition_what_the_source_says(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches cells of other rows, a gold token counted twice, mass that grows, and ranges of other prefixes."""
    fusechat.align(stores[1], stores[0], tmp_path / "out", granularity="cells")
    chain = fusechat.align(stores[1], stores[0], tmp_path / "chain", granularity="chain")
    pivot, source, aligned = open_topk(stores[1]), open_topk(stores[0]), open_aligned(tmp_path / "out")
    plain = open_aligned(tmp_path / "chain")
    order = read_byte_order(tmp_path / "out")
    sides = [store_vocabulary(store.directory, store.manifest).table for store in (source, pivot)]
    seen = 0
    for index in pivot:
        got, p, s = aligned[index], pivot[index], source[index]
        for key in ("row.ids", "row.logprobs", "row.kind"):
            assert (got[key] == plain[index][key]).all()
        finer = np.flatnonzero(got["row.kind"] == RowKind.FINER)
        assert len(got["cell.ids"]) == len(finer)
        for f, r in enumerate(finer.tolist()):
            gold = int(p["token.input_ids"][r + 1])
            mass = np.exp(got["cell.logprobs"][f].astype(float))
            start = max(int(p["token.byte_end"][r]), 0)
            row = int(np.flatnonzero(np.maximum(s["token.byte_end"][:-1], 0) == start)[-1])
            piece = sides[0].token(int(s["token.input_ids"][row + 1]))
            lead = b" " if sides[1].token(gold).startswith(b" ") and not piece.startswith(b" ") and start == 0 else b""
            assert got["cell.ids"][f, 0] == gold
            assert np.log(mass[0]) == pytest.approx(got["row.gold_logprob"][r], abs=2e-2)
            assert mass.sum() <= 1.01
            of_piece = [
                k
                for k in range(1, len(mass))
                if got["cell.high"][f, k] > got["cell.low"][f, k]
                and gold in order[got["cell.low"][f, k] : got["cell.high"][f, k]]
                and all(
                    sides[1].token(int(t)).startswith(lead + piece)
                    for t in order[got["cell.low"][f, k] : got["cell.high"][f, k]]
                )
            ]
            p_piece = float(np.exp(s["row.gold_logprob"][row]))
            held = mass[0] + (mass[of_piece].max() if of_piece else 0)
            assert held == pytest.approx(p_piece, abs=5e-3)
            seen += 1
    assert seen > 20
    assert chain["coverage"] == aligned.manifest["coverage"]
    with pytest.raises(FormatError, match="granularity: cells"):
        read_byte_order(tmp_path / "chain")


@pytest.mark.parametrize("vocab", ["mined", "ms", "ms-soft", "ms-upstream"])
def test_every_map_runs_from_store_to_store(tmp_path: Path, stores: tuple[Path, Path], vocab: str) -> None:
    """Catches a map that the stage cannot build, counts that depend on threads, and mass that grows."""
    for workers in (1, 2):
        fusechat.align(*stores, tmp_path / f"{workers}", vocab=vocab, workers=workers)
    assert checksums(tmp_path / "1") == checksums(tmp_path / "2")
    aligned = open_aligned(tmp_path / "1")
    for index in aligned:
        assert (np.exp(aligned[index]["row.logprobs"].astype(float)).sum(axis=1) <= 1.01).all()
    exact = fusechat.align(*stores, tmp_path / "exact", vocab="exact")["coverage"]["mass"]
    # The research code's map knows only pairs it has seen; these tokenizers have no unknown token to send the rest to.
    assert (aligned.manifest["coverage"]["mass"]["lost"] < exact["lost"]) == (vocab != "ms-upstream")


def test_the_papers_preset_is_dtw_and_its_branches(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches a stage that differs from dtw → counts → map → distribute done dialogue by dialogue."""
    manifest = fusechat.align(*stores, tmp_path / "out", preset="paper")
    assert {key: manifest[key] for key in ("tokens", "vocab", "collisions")} == {
        "tokens": "dtw",
        "vocab": "ms-upstream",
        "collisions": "first",
    }
    pivot, source, aligned = open_topk(stores[0]), open_topk(stores[1]), open_aligned(tmp_path / "out")
    sides = [store_vocabulary(store.directory, store.manifest) for store in (source, pivot)]
    strings = [side.strings() for side in sides]
    marks = {"source_mark": sides[0].mark, "pivot_mark": sides[1].mark}
    assert list(marks.values()) == ["▁", "Ġ"]
    tokens: dict[int, list[list[str]]] = {}
    pairs = []
    for index in pivot:
        if index not in source:
            continue
        ids = [store[index]["token.input_ids"].tolist() for store in (source, pivot)]
        tokens[index] = [[names[i] for i in side] for names, side in zip(strings, ids)]
        for position, partners in enumerate(dtw(*tokens[index], **marks).pivot_to_source):
            pairs += [(s, ids[1][position]) for s in {ids[0][j] for j in partners}]
    counts = PairCounts.of(np.array([s for s, _ in pairs]), np.array([p for _, p in pairs]))
    target = vocab_map(
        sides[0].table,
        sides[1].table,
        "ms-upstream",
        counts=counts,
        source_spelling=sides[0].spelling(),
        pivot_spelling=sides[1].spelling(),
    ).target[:, 0]
    taken = 0
    for index in pivot:
        got = aligned[index]
        if index not in source:
            assert np.isneginf(got["row.logprobs"]).all()
            continue
        s, p = source[index], pivot[index]
        padded = [np.concatenate([s[key], s[key][-1:]]) for key in ("row.ids", "row.logprobs")]
        want = distribute(
            dtw(*tokens[index], **marks).pivot_to_source,
            *tokens[index],
            **marks,
            target=target,
            ids=padded[0],
            logprobs=padded[1],
            next_ids=np.append(p["token.input_ids"][1:], 0),
        )
        chosen = branches(dtw(*tokens[index], **marks).pivot_to_source, *tokens[index], **marks)[:-1]
        served = chosen != len(s["token.input_ids"]) - 1  # the source's last token has no row
        assert (got["row.ids"][served] == want.ids[:-1][served]).all()
        assert (got["row.logprobs"][served] == want.logprobs[:-1][served]).all()
        assert (
            (got["row.kind"] == RowKind.SAME) == ((chosen >= 0) & served & ~np.isneginf(want.logprobs[:-1, 0]))
        ).all()
        taken += int((chosen >= 0).sum())
    assert taken > 50


@pytest.mark.parametrize("pivot", ["trained", "llama-3"])
def test_ends_of_turns_map_to_the_token_that_ends_the_pivots(
    tmp_path: Path, request: pytest.FixtureRequest, tokenizers: tuple[Tokenizer, Tokenizer], pivot: str
) -> None:
    """Catches the first token whose name ends turns taught where another does: Llama-3.1's <|eom_id|>."""
    tokenizer, end, not_end = tokenizers[0], "<|endoftext|>", "<|im_end|>"
    if pivot == "llama-3":
        folder = request.getfixturevalue("shared_data") / "tokenizers" / pivot
        tokenizer, end, not_end = Tokenizer.from_file(str(folder / "tokenizer.json")), "<|eot_id|>", "<|eom_id|>"
    stores = (
        write_store(tmp_path / "pivot", tokenizer, k=4, per_shard=4, seed=1, end=end),
        write_store(tmp_path / "source", tokenizers[1], k=4, per_shard=4, seed=2),
    )
    choices = {"granularity": "cells", "unaligned": "gold", "collisions": "sum"}
    chosen = {"tokens": "bytes", "vocab": "exact", **choices}
    task = Task(pivot_store=stores[0], source_store=stores[1], out=tmp_path / "out", chosen=chosen, threads=1)
    work = ShardWork(task)
    number = work.aligner.map_index("exact", b"", b"")
    end_of_source = tokenizers[1].token_to_id("</s>")
    assert work.aligner.maps.target[number, end_of_source, 0] == tokenizer.token_to_id(end)
    assert end_by_role(work.aligner.pivot.table) == tokenizer.token_to_id(not_end)


def test_a_store_is_not_read_for_a_token_that_no_map_asks_for(
    tmp_path: Path, stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a pass over all of the pivot's tokens whose result the research code's map ignores."""
    read: list[Any] = []
    monkeypatch.setattr(RowView, "of", lambda block, table: read.append(block))
    ShardWork(Task(pivot_store=stores[0], source_store=stores[1], out=tmp_path, chosen=PRESETS["paper"], threads=1))
    assert read == []


@pytest.mark.parametrize("unaligned", ["gold", "pivot", "skip"])
def test_unaligned_rows(tmp_path: Path, stores: tuple[Path, Path], unaligned: str) -> None:
    """Catches a one-hot row where the trainer was to decide."""
    manifest = fusechat.align(*stores, tmp_path / "out", unaligned=unaligned)
    assert manifest["unaligned"] == unaligned
    row = open_aligned(tmp_path / "out")[3]["row.logprobs"]  # a dialogue the source skipped
    assert np.isneginf(row[:, 1:]).all()
    assert (row[:, 0] == (0 if unaligned == "gold" else -np.inf)).all()


def test_stores_that_do_not_belong_together_are_refused(
    tmp_path: Path, stores: tuple[Path, Path], tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    """Catches rows of other dialogues, of another tokenizer, or with other choices taken for these."""
    other = write_store(tmp_path / "other", tokenizers[1], k=4, per_shard=4, seed=3, data="e" * 64)
    with pytest.raises(MismatchError, match=f"{'d' * 64} and {'e' * 64}"):
        fusechat.align(stores[0], other, tmp_path / "out")
    fusechat.align(*stores, tmp_path / "out")
    with pytest.raises(MismatchError, match="granularity"):
        fusechat.align(*stores, tmp_path / "out", granularity="gold")
    shutil.copy(tmp_path / "pivot-model" / "tokenizer.json", tmp_path / "source-model" / "tokenizer.json")
    with pytest.raises(FusechatError, match=r"SHA-256|only \d+ rows"):
        fusechat.align(*stores, tmp_path / "out2")
    shutil.rmtree(tmp_path / "source-model")
    with pytest.raises(FusechatError, match="tokenizer is needed"):
        fusechat.align(*stores, tmp_path / "out3")


def test_choices_and_damage_are_named(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches a misspelt choice, an unfinished store, and a truncated shard."""
    with pytest.raises(ConfigError, match=r"align.vocab: 'fuzzy' is not one of exact, "):
        fusechat.align(*stores, tmp_path / "out", vocab="fuzzy")
    with pytest.raises(ConfigError, match=r"'cells' needs byte offsets.*granularity: first"):
        fusechat.align(*stores, tmp_path / "out", tokens="dtw")
    with pytest.raises(MismatchError, match=r'inputs \(format: "fusechat.topk" there, "fusechat.aligned" here\)'):
        fusechat.align(*stores, stores[0])
    with pytest.raises(ConfigError, match="'papre' is not one of paper"):
        fusechat.align(*stores, tmp_path / "out", preset="papre")
    with pytest.raises(ConfigError, match=r"preset: paper is vocab: ms-upstream: leave out align.vocab: ms, or "):
        fusechat.align(*stores, tmp_path / "out", preset="paper", tokens="dtw", vocab="ms")
    shard = stores[1] / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(FormatError, match="the manifest says"):
        fusechat.align(*stores, tmp_path / "out")
    manifest: Json = json.loads((stores[0] / MANIFEST).read_text())
    (stores[0] / MANIFEST).write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(FormatError, match="other artefact"):
        fusechat.align(*stores, tmp_path / "out")


def test_inspect_shows_what_became_of_rows(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches a report whose keys the command line does not know."""
    fusechat.align(*stores, tmp_path / "out", vocab="exact")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    report = read_coverage(tmp_path / "out")
    for kind, count in report["n_rows"].items():
        assert re.search(rf"{kind} +{count}\b", shown.output)
    assert "lost most" in shown.output
    assert repr(report["examples"][0]["pivot"][0]["text"]) in shown.output


def test_inspect_finds_the_pivot_of_a_run_that_was_moved(tmp_path: Path, stores: tuple[Path, Path]) -> None:
    """Catches a sample that is looked for where the run once stood."""
    shutil.copytree(stores[0], tmp_path / "run" / "extract" / "pivot")
    fusechat.align(tmp_path / "run" / "extract" / "pivot", stores[1], tmp_path / "run" / "align" / "source")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    shown = CliRunner().invoke(app, ["inspect", str(moved / "align" / "source")])
    assert (shown.exit_code, "distribution of the next token" in shown.output) == (0, True)


def test_inspect_says_that_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"results\.json does not exist"):
        describe(tmp_path / "results.json")
