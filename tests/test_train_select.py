"""Who teaches which row: every rule and unit against a slow reference, mixtures, and sources of the same vocabulary."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusechat
from fusechat.artifact import sha256_file
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError, MismatchError
from fusechat.loss import Cells, candidate_weights, sparse_soft_ce
from fusechat.store import open_aligned, open_topk, same_vocabulary
from fusechat.train.collate import collate
from fusechat.train.dataset import FusionDataset
from fusechat.train.matched import open_matched
from fusechat.train.select import Selection, row_weights
from fusechat.train.source import TwinSource, open_source
from fusechat.train_config import TrainConfig, parse_train

FAST = ["max_steps=2", "batch_size=6", "micro_batch_size=3", "learning_rate=1e-3", "warmup_ratio=0"]


@pytest.fixture(scope="module")
def stores(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pivot, a source of another vocabulary, and a twin: the pivot with other weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("stores")
    shutil.copytree(tiny_world.pivot, folder / "twin-model")
    model = AutoModelForCausalLM.from_pretrained(tiny_world.pivot)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "twin-model")
    dialogues = load_dialogues(tiny_world.dialogues)
    models = {"pivot": tiny_world.pivot, "source": tiny_world.source, "twin": folder / "twin-model"}
    for name, path in models.items():
        fusechat.extract(str(path), dialogues, folder / name, top_k=5)
    for name in ("source", "twin"):
        fusechat.align(folder / "pivot", folder / name, folder / f"{name}-aligned")
    shutil.copytree(folder / "source-aligned", folder / "source-again")
    return folder


def _dataset(stores: Path, names: tuple[str, ...], **options: Any) -> FusionDataset:
    pivot = open_topk(stores / "pivot")
    wins = options.pop("when_pivot_wins", "labels")
    return FusionDataset(
        pivot,
        [open_source(stores / name, pivot, name) for name in names],
        select=Selection(**options),
        when_pivot_wins=wins,
    )


def _units(record: dict[str, Any], unit: str) -> list[Any]:
    turn = record["token.turn"][np.flatnonzero(record["token.loss_mask"][1:]) + 1].tolist()
    return turn if unit == "turn" else list(range(len(turn)))


@pytest.mark.parametrize("unit", ["turn", "token"])
@pytest.mark.parametrize("ce_unit", ["byte", "token"])
@pytest.mark.parametrize("rule", ["min_ce", "avg_ce", "source", "weighted"])
def test_turns_and_tokens_are_decided_on_the_rows_both_have(stores: Path, rule: str, unit: str, ce_unit: str) -> None:
    asked = {"pivot": 0.5, "twin": 2.0} if rule == "weighted" else {}
    names = ("source-aligned", "twin")
    dataset = _dataset(stores, names, rule=rule, unit=unit, ce_unit=ce_unit, weights=asked, when_pivot_wins="pivot")
    aligned, twin = open_aligned(stores / "source-aligned"), open_topk(stores / "twin")
    decided = set()
    for position, dialogue in enumerate(dataset.indices[:8]):
        record = dataset.pivot[dialogue]
        gold = [record["row.gold_logprob"], aligned[dialogue]["row.gold_logprob"], twin[dialogue]["row.gold_logprob"]]
        assert dataset.have[:, position].all()
        weights = row_weights(dataset.sources, np.stack(gold), record, dataset.select)
        units = _units(record, unit)
        predicted = np.flatnonzero(record["token.loss_mask"][1:]) + 1
        for u in set(units):
            rows = [r for r, value in enumerate(units) if value == u]
            size = 0.0
            for r in rows:
                p = predicted[r]
                begin = record["token.byte_end"][p - 1] if record["token.turn"][p - 1] == record["token.turn"][p] else 0
                n_bytes = max(int(record["token.byte_end"][p] - begin), 0)
                size += 1 if ce_unit == "token" else max(n_bytes, 1) if unit == "token" else n_bytes
            # A source without a probability for a token is taken to predict it as the pivot does.
            ce = [sum(-float(g[r] if np.isfinite(g[r]) else gold[0][r]) for r in rows) / size for g in gold]
            for r in rows:
                known = [bool(np.isfinite(g[r])) for g in gold]
                if rule == "avg_ce":
                    raw = [math.exp(-c) if k else 0.0 for c, k in zip(ce, known)]
                elif rule == "weighted":
                    raw = [w * k for w, k in zip([0.5, 1.0, 2.0], known)]
                elif rule == "source":
                    can = [c for c in (1, 2) if any(np.isfinite(gold[c][q]) for q in rows)]
                    best = min(can, key=lambda c: ce[c])
                    raw = [float(c == best) * k for c, k in enumerate(known)]
                else:
                    raw = [float(c == ce.index(min(ce))) * k for c, k in enumerate(known)]
                expected = [w / sum(raw) for w in raw] if sum(raw) else [1.0, 0.0, 0.0]
                np.testing.assert_allclose(weights[:, r], expected, rtol=1e-5, atol=1e-7)
                decided.add(int(weights[:, r].argmax()))
    assert len(decided) > 1 or rule in ("source", "weighted")


@pytest.mark.parametrize("unit", ["turn", "token"])
@pytest.mark.parametrize("rule", ["min_ce", "avg_ce"])
def test_rows_are_weighed_as_by_the_loss_library(stores: Path, rule: Any, unit: str) -> None:
    dataset = _dataset(stores, ("twin",), rule=rule, unit=unit, ce_unit="token")
    twin = open_topk(stores / "twin")
    for dialogue in dataset.indices[:8]:
        record = dataset.pivot[dialogue]
        gold = np.stack([record["row.gold_logprob"], twin[dialogue]["row.gold_logprob"]])
        units = torch.tensor(_units(record, unit))
        theirs = candidate_weights(torch.from_numpy(gold.T), units, choice=rule, n_units=int(units.max()) + 1)
        np.testing.assert_allclose(row_weights(dataset.sources, gold, record, dataset.select).T, theirs, rtol=1e-5)


@pytest.mark.parametrize(("other", "of_pivot"), [("twin", 0.5), ("source-again", 0.0)])
def test_mixtures_have_the_cross_entropy_of_their_parts(stores: Path, other: str, of_pivot: float) -> None:
    """Rows that partition the vocabulary cannot be mixed; they stand beside the mixture, and nothing changes by it.

    Where all candidates partition it, there is no mixture.
    """
    weights = {"pivot": of_pivot, "source-aligned": 2.0, other: 1.5}
    names = ("source-aligned", other)
    mixed = _dataset(stores, names, rule="weighted", weights=weights, when_pivot_wins="pivot")
    order = torch.from_numpy(mixed.byte_order)
    torch.manual_seed(0)

    def loss(dataset: FusionDataset, position: int, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        batch = collate([dataset[position]], pad_token_id=0)
        rows = batch["rows"]
        cells = (
            Cells(order=order, low=batch["target_low"], high=batch["target_high"]) if "target_low" in batch else None
        )
        hard_weight = 1 - batch["taught"]
        out = sparse_soft_ce(
            logits[rows], batch["row_labels"], batch["target_ids"], batch["target_logprobs"], hard_weight=hard_weight,
            row_weight=batch["row_weight"], partition=batch["partition"], cells=cells, missing="zero", inplace=False,
        )  # fmt: skip
        assert (batch["row_weight"] > 0).all()  # a row without weight would cost its logits
        position_weight = torch.zeros(len(logits)).index_add_(0, rows, batch["row_weight"])
        assert torch.allclose(position_weight[position_weight > 0], torch.ones(()))
        soft = torch.zeros(len(logits)).index_add_(0, rows, out.soft * batch["row_weight"])
        return soft, batch

    split = 0
    for position in range(6):
        logits = torch.randn(len(mixed[position].input_ids), len(order))
        together, batch = loss(mixed, position, logits)
        split += len(batch["rows"]) - len(set(batch["rows"].tolist()))
        alone, present = [], []
        for name in ("pivot", *names):
            only = {n: float(n == name) for n in ("pivot", *names)}
            one = _dataset(stores, names, rule="weighted", weights=only, when_pivot_wins="pivot")
            soft, columns = loss(one, position, logits)
            alone.append(soft)
            has = torch.zeros(len(logits)).index_add_(0, columns["rows"], (columns["taught"] > 0).float())
            present.append(has)
        w = torch.tensor(list(weights.values()))[:, None] * torch.stack(present)
        expected = (w * torch.stack(alone)).sum(0) / w.sum(0).clamp(min=1e-9)
        rows = sorted(set(batch["rows"].tolist()))
        torch.testing.assert_close(together[rows], expected[rows], rtol=2e-3, atol=2e-3)
    assert split > 0


def test_all_sources_compete_in_multi(stores: Path, tiny_world: Any, tmp_path: Path) -> None:
    dataset = _dataset(stores, ("source-aligned", "twin"))
    assert (dataset.weights.sum(0) == 1).all()
    for i, dialogue in enumerate(dataset.indices):
        record = open_aligned(stores / "source-aligned")[dialogue]
        twin = -open_topk(stores / "twin")[dialogue]["row.gold_logprob"].sum(dtype=np.float64)
        nll = [float(record["dialogue.pivot_nll"][0]), float(record["dialogue.source_nll"][0]), twin]
        assert int(dataset.weights[:, i].argmax()) == int(np.argmin(np.round(nll, 3)))
    both = [stores / "source-aligned", stores / "twin"]
    with pytest.raises(ConfigError, match="pairwise takes one source, 2 were given"):
        fusechat.train(str(tiny_world.pivot), stores / "pivot", both, tmp_path / "t", parse_train(FAST))
    config = parse_train([*FAST, "mode=multi", "select=avg_ce", "select_unit=token", "logging_steps=1"])
    made = fusechat.train(str(tiny_world.pivot), stores / "pivot", both, tmp_path / "t", config)
    assert [s["name"] for s in made["sources"]] == ["source-aligned", "twin"]
    line = json.loads((tmp_path / "t" / "training.jsonl").read_text().splitlines()[0])
    shares = [line[f"share_{name}"] for name in ("pivot", "source-aligned", "twin")]
    assert sum(shares) == pytest.approx(1)


@pytest.fixture(scope="module")
def control(stores: Path, tiny_world: Any) -> dict[str, Any]:
    """What the SFT control makes of the default settings."""
    made = fusechat.train(
        str(tiny_world.pivot), stores / "pivot", None, stores / "control", parse_train([*FAST, "logging_steps=1"]),
        held_out=load_dialogues(tiny_world.dialogues)[:4],
    )  # fmt: skip
    return {"losses": made["losses"], **made["measured"]}


SELECTIONS = [
    *(("soft", rule, unit) for rule in ("min_ce", "avg_ce", "source", "weighted") for unit in ("sequence", "token")),
    *((objective, rule, "sequence") for objective in ("alm", "uld") for rule in ("min_ce", "source")),
]


@pytest.mark.parametrize(("objective", "select", "unit"), SELECTIONS)
def test_the_control_is_the_same_whatever_teaches_the_targets(
    objective: str, select: str, unit: str, control: dict[str, Any], stores: Path, tiny_world: Any, tmp_path: Path
) -> None:
    settings = [f"objective={objective}", f"select={select}", f"select_unit={unit}", "hard_weight=0.2"]
    settings += ["mode=multi"] if select in ("source", "weighted") else []
    settings += ["when_pivot_wins=pivot"] if select in ("source", "weighted") and objective == "soft" else []
    settings += ["source_weights={pivot: 0.5, twin: 2}"] if select == "weighted" else []
    made = fusechat.train(
        str(tiny_world.pivot), stores / "pivot", None, tmp_path / "t",
        parse_train([*FAST, "logging_steps=1", *settings]), held_out=load_dialogues(tiny_world.dialogues)[:4],
    )  # fmt: skip
    assert made["losses"] == pytest.approx(control["losses"], rel=1e-6)
    for (step, bits), (own_step, own_bits) in zip(
        made["measured"]["held_out_bits_per_byte"], control["held_out_bits_per_byte"], strict=True
    ):
        assert (step, bits) == (own_step, pytest.approx(own_bits, rel=1e-6))
    log = [json.loads(line) for line in (tmp_path / "t" / "training.jsonl").read_text().splitlines()]
    assert {line["coverage"] for line in log if "coverage" in line} == {0.0}


def test_a_source_of_the_same_vocabulary_needs_no_alignment(stores: Path) -> None:
    assert same_vocabulary(stores / "pivot", stores / "twin")
    assert not same_vocabulary(stores / "pivot", stores / "source")
    direct, aligned = _dataset(stores, ("twin",), rule="source"), _dataset(stores, ("twin-aligned",), rule="source")
    assert isinstance(direct.sources[0], TwinSource)
    for position in range(len(direct)):
        one, other = direct[position], aligned[position]
        np.testing.assert_array_equal(one.rows, other.rows)
        for row in range(len(one.rows)):
            ours = dict(zip(one.targets.ids[row].tolist(), one.targets.logprobs[row].tolist()))
            theirs = dict(zip(other.targets.ids[row].tolist(), other.targets.logprobs[row].tolist()))
            assert ours == pytest.approx({k: v for k, v in theirs.items() if v > -np.inf}, abs=2e-3)
    pivot = open_topk(stores / "pivot")
    with pytest.raises(MismatchError, match="have different tokenizers"):
        open_source(stores / "source", pivot, "source")


@pytest.mark.parametrize("objective", ["alm", "uld"])
def test_matched_rows_and_chunks_cover_the_same_bytes(stores: Path, objective: Any) -> None:
    pivot = open_topk(stores / "pivot")
    source = open_topk(stores / "source")
    matched = open_matched(stores / "source-aligned", pivot, objective)
    aligned = open_aligned(stores / "source-aligned")
    n_chunks = 0
    for dialogue in list(pivot)[:10]:
        found = matched.at(dialogue)
        kind = aligned[dialogue]["row.kind"]
        if objective == "uld":
            assert (found.targets.present() == (kind != 3)).all()
            assert (np.diff(np.where(found.targets.present()[:, None], found.targets.logprobs, 0), axis=1) <= 0).all()
            continue
        ours, theirs = pivot[dialogue], source[dialogue]
        # Every chunk begins where both have a boundary, and all chunks of a turn add up to the turn's likelihood.
        begins = [
            r for r in range(len(kind)) if found.chunk[r] >= 0 and (r == 0 or found.chunk[r] != found.chunk[r - 1])
        ]
        assert all(kind[r] != 3 for r in begins)
        n_chunks += len(begins)
        if (found.chunk >= 0).all():
            assert found.chunk_logprob.sum() == pytest.approx(float(theirs["row.gold_logprob"].sum()), rel=1e-4)
        assert len(found.chunk) == len(ours["row.ids"])
    assert objective == "uld" or n_chunks > 20


@pytest.mark.parametrize("objective", ["alm", "uld"])
def test_training_without_a_vocabulary_map_lowers_its_loss(
    stores: Path, tiny_world: Any, tmp_path: Path, objective: str
) -> None:
    steps = ["max_steps=8", "batch_size=24", "micro_batch_size=8", "learning_rate=3e-3", "warmup_ratio=0"]
    what = [f"objective={objective}", "select=source", "hard_weight=0", "logging_steps=1"]
    what += ["alm_temperature=10"] if objective == "alm" else []
    config = parse_train([*steps, *what])
    from transformers import AutoModelForCausalLM

    # Untrained models are all alike: a source that is sure of something has to be made.
    shutil.copytree(stores / "twin-model", tmp_path / "sharp-model")
    model = AutoModelForCausalLM.from_pretrained(stores / "twin-model")
    with torch.no_grad():
        model.base_model.norm.weight *= 30
    model.save_pretrained(tmp_path / "sharp-model")
    fusechat.extract(str(tmp_path / "sharp-model"), load_dialogues(tiny_world.dialogues), tmp_path / "sharp", top_k=5)
    fusechat.train(str(tiny_world.pivot), stores / "pivot", tmp_path / "sharp", tmp_path / "t", config)
    soft = [json.loads(line)["soft_loss"] for line in (tmp_path / "t" / "training.jsonl").read_text().splitlines()]
    assert soft[-1] < soft[0]


def test_a_changed_source_store_is_refused(stores: Path, tmp_path: Path) -> None:
    shutil.copytree(stores / "source-aligned", tmp_path / "aligned")
    manifest = json.loads((tmp_path / "aligned" / "manifest.json").read_text())
    (tmp_path / "aligned" / "manifest.json").write_text(json.dumps(manifest | {"source_store_sha256": "0" * 64}))
    pivot = open_topk(stores / "pivot")
    assert manifest["pivot_store_sha256"] == sha256_file(pivot.directory / "manifest.json")
    with pytest.raises(MismatchError, match=r"is not what .* was aligned from"):
        open_matched(tmp_path / "aligned", pivot, "alm")


def test_a_weight_for_no_source_is_refused(stores: Path) -> None:
    with pytest.raises(ConfigError, match="source_weights names nobody"):
        _dataset(stores, ("twin",), rule="weighted", weights={"nobody": 1.0})
    with pytest.raises(ConfigError, match="source_weights are numbers of 0 or more"):
        parse_train(["source_weights.twin=1"])


def test_the_weight_of_the_labels_follows_its_schedule() -> None:
    from fusechat.train.fit import hard_weight_schedule

    constant = hard_weight_schedule(TrainConfig(hard_weight=0.7))
    linear = hard_weight_schedule(TrainConfig(hard_weight=0.2, hard_weight_end=0.8))
    cosine = hard_weight_schedule(TrainConfig(hard_weight=0.2, hard_weight_end=0.8, hard_weight_schedule="cosine"))
    assert [constant(p) for p in (0, 0.5, 1)] == [0.7] * 3
    assert [linear(p) for p in (0, 0.25, 1)] == pytest.approx([0.2, 0.35, 0.8])
    assert [cosine(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.2 + 0.3 * (1 - 0.5**0.5), 0.5, 0.8])
