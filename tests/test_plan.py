"""The plan of a whole run: what it counts of data and stages, what it decides, and what it advises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusechat
import fusechat.plan as room
from fusechat.align.stage import chosen_rules
from fusechat.config import AlignConfig, EvalConfig, ExtractConfig, RunConfig, parse_config
from fusechat.errors import ConfigError
from fusechat.merge.estimate import engine_bytes, expected_engine_bytes
from fusechat.plan import Plan, plan
from fusechat.plan.alignment import plan_alignment
from fusechat.plan.hardware import load_hardware
from fusechat.plan.merging import plan_merge
from fusechat.plan.models import model_shape
from fusechat.plan.projection import papers_config
from fusechat.plan.stage import StagePlan
from fusechat.plan.training import plan_training
from fusechat.plan.workload import Lengths
from fusechat.split import load_split
from fusechat.train_config import TrainConfig


@pytest.fixture(scope="module")
def paper() -> RunConfig:
    return papers_config()


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the children that measure an empty process."""
    monkeypatch.setattr(room, "process_bytes", lambda stages: dict.fromkeys(stages, 400_000_000))


def stage(result: Plan, what: str, name: str) -> StagePlan:
    return next(s for s in result.stages if (s.stage, s.name) == (what, name))


def test_the_paper_fits_the_paper_s_machine_with_full_sharding_only(paper: RunConfig) -> None:
    result = plan(paper, load_hardware("a100-40"))
    train = stage(result, "train", "qwen")
    assert train.settings["strategy"] == "fsdp2"
    assert train.fits
    for ways in (("ddp", "fsdp2", "fsdp2+offload"), ("zero1", "zero2", "zero3")):
        sizes = [result.strategies[way] for way in ways]
        assert sizes == sorted(sizes, reverse=True), "more sharding takes less"
    assert stage(result, "extract", "qwen").settings["tensor_parallel_size"] == 8
    assert stage(result, "extract", "pivot").settings["engines"] == 8
    assert {s.name for s in result.stages if s.stage == "extract"} == {
        "pivot", "starling", "solar", "internlm", "mixtral", "qwen",
    }  # fmt: skip
    assert 2 * 3600 < train.seconds < 10 * 3600  # the authors: about 7 hours


def test_the_state_of_a_7b_model_is_what_a_hand_counts(paper: RunConfig) -> None:
    """Adam in float32 is 16 bytes a parameter, an eighth of it a GPU; DeepSpeed keeps 2 + 2 of them in bfloat16."""
    n = 7_241_748_480  # openchat_3.5: a Mistral 7B of 32,002 tokens
    result = plan(paper, load_hardware("a100-40"))
    train = stage(result, "train", "qwen")
    assert sum(train.device_parts[part] for part in ("weights", "gradients", "optimizer")) == pytest.approx(
        16 * n / 8, rel=1e-3
    )
    # Weights, less what is gathered; a twentieth is fragmentation.
    assert result.strategies["zero2"] - result.strategies["zero3"] < 2 * n * 7 / 8 * 1.05
    assert result.strategies["zero1"] - result.strategies["zero2"] == pytest.approx(2 * n * 7 / 8 * 1.05, rel=1e-3)
    extract = stage(result, "extract", "qwen")  # 80 layers of 64 heads of 128, no grouped heads
    assert extract.device_parts["weights"] == pytest.approx(2 * 72.3e9 / 8, rel=1e-3)
    assert extract.device_parts["kv cache"] == 4096 * 2 * 80 * 8192 * 2 / 8  # a step's tokens; 2,049 would do


def test_what_a_plan_advises_makes_it_fit(paper: RunConfig) -> None:
    hardware = replace(load_hardware("a100-40", gpus=4), host_memory_bytes=2_000_000_000_000)
    tight = replace(hardware, memory_bytes=16_000_000_000)
    before = stage(plan(paper, tight), "train", "solar")
    if before.fits:  # offloading was enough: take less
        tight = replace(hardware, memory_bytes=before.device_bytes - 1_000_000_000)
        before = stage(plan(paper, tight), "train", "solar")
    assert not before.fits
    (advice,) = before.changes
    values = paper.model_dump()
    for change in advice.split(" and "):
        key, _, value = change.removeprefix("train.").partition(": ")
        values["train"][key] = {"true": True, "{rank: 16}": {"rank": 16}}.get(value) or (
            int(value) if value.isdecimal() else value
        )
    assert stage(plan(parse_config(values, "advised"), tight), "train", "solar").fits


@pytest.mark.parametrize("budget_bytes", [None, 1 << 20])
def test_what_is_advised_for_a_large_vocabulary_is_no_refused_budget(budget_bytes: int | None) -> None:
    """Catches a plan that ends at its own advice: the sum of the head's gradient has no room in the loss's budget."""
    shape = replace(model_shape("openchat/openchat_3.5")[0], vocab=128_256)
    found = Lengths(n_dialogues=1000, sample=np.full(10, 2048), row_share=1.0, distinct_ids=9)
    config = TrainConfig(loss_budget_bytes=budget_bytes)
    row, _ = plan_training("x", shape, found, config, load_hardware("rtx4090", gpus=1), 0)
    assert not row.fits
    assert row.changes


def test_local_dialogues_are_counted_and_assumed_ones_said(tiny_world: Any, light: None, tmp_path: Path) -> None:
    values = {
        "pivot": str(tiny_world.pivot), "sources": [str(tiny_world.source)], "out": str(tmp_path / "run"),
        "data": {"train": str(tiny_world.dialogues), "held_out_fraction": 0.25},
        "train": {"batch_size": 4, "micro_batch_size": 2, "epochs": 2},
    }  # fmt: skip
    values["sources"] = [{"model": str(tiny_world.source)}]
    result = plan(parse_config(values, "here"), load_hardware("cpu"))
    assert not any("bytes a token" in text for text in result.assumptions)
    train = stage(result, "train", "source")
    assert train.settings["steps"] == 2 * 5  # 18 dialogues in batches of 4, twice
    assert train.devices == 0
    assert result.fits
    assert not (tmp_path / "run").exists()
    values["data"] = {"train": "somebody/unknown"}
    with pytest.raises(ConfigError, match="--dialogues"):
        plan(parse_config(values, "here"), load_hardware("cpu"))
    more = plan(parse_config(values, "here"), load_hardware("cpu"), dialogues=1000, tokens_per_dialogue=50)
    assert any("1,000 dialogues of 50 tokens" in text for text in more.assumptions)


def test_a_source_is_counted_as_it_is_extracted(
    tiny_world: Any, light: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder is called `pivot`

    def store(run: dict[str, Any], own: dict[str, Any] | None) -> int:
        values = {
            "pivot": str(tiny_world.pivot), "out": str(tmp_path / "run"), "data": {"train": str(tiny_world.dialogues)},
            "sources": [{"model": str(tiny_world.source), "extract": own}], "extract": run,
        }  # fmt: skip
        result = plan(parse_config(values, "here"), load_hardware("cpu"))
        assert not any("bytes a token" in text for text in result.assumptions)
        return stage(result, "extract", "source").disk_bytes

    plain = store({}, None)
    assert store({"template": "pivot"}, None) == store({"template": str(tiny_world.pivot)}, None) != plain
    assert store({}, {"template": "pivot"}) == store({"template": "pivot"}, None)
    assert store({}, {"max_length_tokens": 40}) == store({"max_length_tokens": 40}, None) < plain


def test_an_aligned_store_has_the_pivot_s_rows(paper: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan(paper, load_hardware("a100-40"))
    own = room.lengths

    def wordier_sources(workload: Any, model: str, *arguments: Any) -> tuple[Lengths, str]:
        found, how = own(workload, model, *arguments)
        return (found if model == paper.pivot else replace(found, sample=found.sample * 3)), how

    monkeypatch.setattr(room, "lengths", wordier_sources)
    after = plan(paper, load_hardware("a100-40"))
    assert stage(after, "extract", "qwen").disk_bytes > 2 * stage(before, "extract", "qwen").disk_bytes
    assert stage(after, "align", "qwen") == stage(before, "align", "qwen")
    rows = stage(after, "align", "qwen").disk_bytes / (10 * (2 + 2) + 5 + 0.1 * 12 * (4 + 8))
    assert rows == pytest.approx(94_050 * 600 * 0.75, rel=0.03)


@pytest.mark.parametrize("granularity", ["cells", "chain"])
def test_the_memory_of_aligning_is_the_stage_s(tiny_world: Any, tmp_path: Path, granularity: str) -> None:
    """Catches a plan that forgets what the stage loads on its way: numba, for prefix cells, is two thirds of it."""
    config = parse_config(
        {
            "pivot": str(tiny_world.pivot), "sources": [{"model": str(tiny_world.source)}], "out": str(tmp_path),
            "data": {"train": str(tiny_world.dialogues)}, "align": {"granularity": granularity},
        },
        "here",
    )  # fmt: skip
    dialogues = load_split(config).train
    for name in ("pivot", "source"):
        fusechat.extract(str(getattr(tiny_world, name)), dialogues, tmp_path / name)
    code = (
        "import sys\nfrom fusechat.align import align\nalign(*sys.argv[1:4], granularity=sys.argv[4])\n"
        "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])"
    )
    arguments = [str(tmp_path / part) for part in ("pivot", "source", "aligned")]
    command = [sys.executable, "-c", code, *arguments, granularity]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    planned = stage(plan(config, load_hardware("cpu")), "align", "source")
    assert planned.host_bytes == pytest.approx(int(done.stdout) * 1024, rel=0.15)


def test_max_steps_are_paid_for_whatever_the_epochs(paper: RunConfig) -> None:
    def train(**update: object) -> StagePlan:
        config = paper.model_copy(update={"train": paper.train.model_copy(update={"epochs": 1.0, **update})})
        return stage(plan(config, load_hardware("a100-40")), "train", "qwen")

    whole = train()
    steps = int(str(whole.settings["steps"]))
    for factor in (0.5, 3):
        some = train(max_steps=int(factor * steps))
        assert some.settings["steps"] == int(factor * steps)
        assert some.flops == pytest.approx(factor * whole.flops, rel=0.01)
        assert some.seconds == pytest.approx(factor * whole.seconds, rel=0.01)


@pytest.mark.parametrize("n_selections", [1, 5])
def test_a_merge_is_expected_to_stay_below_its_bound(n_selections: int) -> None:
    """Catches a term that only one of the two counts; bench/plan.py compares with what a merge took."""
    bound, expected = (f(5, 2, n_selections) for f in (engine_bytes, expected_engine_bytes))
    assert bound / 2 < expected < bound


def test_served_sources_are_not_scored(paper: RunConfig) -> None:
    """Catches a plan that asks for a GPU that holds what a server has."""

    def evaluation(config: RunConfig) -> StagePlan:
        return stage(plan(config, load_hardware("a100-40")), "evaluate", "all")

    scored = paper.model_copy(update={"eval": EvalConfig()})
    whole = evaluation(scored)
    assert whole.settings["largest"] == "qwen"
    assert "eval.sources: false, since one device does not hold qwen" in whole.changes
    served = ExtractConfig(backend="vllm-server", servers=["http://a:8000"])
    sources = [s.model_copy(update={"extract": served}) for s in paper.sources]
    none = evaluation(scored.model_copy(update={"sources": sources}))
    assert none.settings["largest"] == "pivot"
    assert none.flops == evaluation(paper).flops < whole.flops  # the paper's run scores no source


def test_leaving_out_the_sources_is_no_advice_for_the_pivot(paper: RunConfig) -> None:
    """Catches advice that changes nothing: the pivot is scored whatever `eval.sources` says."""
    found = stage(plan(paper, load_hardware("a100-40", memory_bytes=1_000_000_000)), "evaluate", "all")
    assert not found.fits
    assert found.changes == ("a smaller extract.batch_tokens",)


def test_one_target_of_all_sources_is_merged_linearly(paper: RunConfig) -> None:
    five = stage(plan(paper, load_hardware("a100-40")), "merge", "sce")
    multi = paper.model_copy(update={"train": paper.train.model_copy(update={"mode": "multi"})})
    result = plan(multi, load_hardware("a100-40"))
    one = stage(result, "merge", "linear")
    assert one.seconds < five.seconds / 2
    assert one.host_bytes < five.host_bytes
    assert [s.name for s in result.stages if s.stage == "train"] == ["multi", "sft"]


def test_a_sweep_is_merged_and_scored_as_often_as_it_says(paper: RunConfig) -> None:
    entries = [
        {"merge_method": "linear", "parameters": {"weight": 1.0}},
        {"merge_method": "ties", "each": {"density": [0.2, 0.6], "weight": [0.5, 1.0]}},
    ]
    swept = paper.model_copy(update={"merge": paper.merge.model_copy(update={"sweep": entries})})
    before, result = (plan(config, load_hardware("a100-40")) for config in (paper, swept))
    row = stage(result, "merge", "sweep")
    assert row.settings["merges"] == 5
    n_train = 95_000 - 950
    assert row.settings["validation_dialogues"] == n_train // 10
    assert row.temporary_disk_bytes == row.disk_bytes == stage(before, "merge", "sce").disk_bytes
    scored = stage(result, "evaluate", "all")  # pivot, five targets, the control, the merge
    assert row.flops / 5 / 9405 == pytest.approx(scored.flops / 8 / 950)
    assert row.device_bytes == pytest.approx(scored.device_bytes, rel=0.05)
    trained = [stage(p, "train", "qwen").flops for p in (before, result)]
    assert trained[1] == pytest.approx(0.9 * trained[0], rel=0.001)


def test_local_data_is_cut_as_the_run_cuts_it(tiny_world: Any, light: None, tmp_path: Path) -> None:
    values = {
        "pivot": str(tiny_world.pivot), "sources": [{"model": str(tiny_world.source)}], "out": str(tmp_path / "run"),
        "data": {"train": str(tiny_world.dialogues), "held_out_fraction": 0.25, "validation_fraction": 0.5},
        "train": {"batch_size": 1, "micro_batch_size": 1, "epochs": 1},
        "merge": {"sweep": [{"merge_method": "linear", "parameters": {"weight": 1.0}}, {"merge_method": "sce"}]},
    }  # fmt: skip
    config = parse_config(values, "here")
    split = load_split(config)
    result = plan(config, load_hardware("cpu"))
    assert stage(result, "train", "source").settings["steps"] == len(split.train) == 9
    row = stage(result, "merge", "sweep")
    assert row.settings["validation_dialogues"] == len(split.validation) == 9
    assert row.flops == pytest.approx(2 * 9 / 6 * stage(result, "evaluate", "all").flops / 5, rel=0.5)  # of five models
    assert row.fits


def test_held_out_dialogues_of_another_place_are_counted_or_said(paper: RunConfig, tiny_world: Any) -> None:
    def held_out(place: str) -> tuple[float, Plan]:
        config = paper.model_copy(update={"data": paper.data.model_copy(update={"held_out": place})})
        result = plan(config, load_hardware("a100-40"))
        assert stage(result, "extract", "pivot").flops > 0
        return stage(result, "evaluate", "all").flops, result

    share, cut = held_out("somebody/unknown")
    assert any("950 dialogues in data.held_out, of which nothing is known" in text for text in cut.assumptions)
    few, counted = held_out(str(tiny_world.dialogues))
    assert few == pytest.approx(share * 24 / 950)
    assert not any("held_out" in text for text in counted.assumptions)


def test_host_stages_go_by_the_kept_results(paper: RunConfig) -> None:
    """CPU-seconds of one core, as bench/results of 2026-11-28 has them."""
    folder = Path(__file__).resolve().parents[1] / "bench" / "results"

    def kept(benchmark: str) -> dict[str, Any]:
        claims = json.loads((folder / f"{benchmark}-cpu-2026-11-28.json").read_text())["claims"]
        return {claim["name"]: claim for claim in claims}

    pivot = model_shape("openchat/openchat_3.5")[0]
    found = Lengths(n_dialogues=100_000, sample=np.full(10, 500), row_share=0.75, distinct_ids=9)

    def align(**options: Any) -> float:
        rules = chosen_rules(**AlignConfig(**options).model_dump())
        return plan_alignment("x", pivot, found, pivot, 10, 512, rules, load_hardware("h200"), 0).seconds

    claims = kept("align")
    stage_claim = claims["align, bytes + ms, store to store"]
    fixed = float(stage_claim["note"].split()[3])
    assert align() == pytest.approx(fixed + 50 / stage_claim["value"], rel=0.02)
    warp = 50 / claims["dtw, corpus, 506 tokens a dialogue"]["value"]
    assert align(tokens="dtw", granularity="first") == pytest.approx(align() + warp, rel=0.02)
    assert align(preset="paper") == pytest.approx(align() + 2 * warp, rel=0.02)

    small = replace(
        pivot, hidden=1024, layers=24, vocab=32_000, intermediate=4096, heads=16, kv_heads=16, head_width=64
    )
    fast_disk = replace(load_hardware("h200"), disk_rate_bytes=1e15)
    for name, layers in (("sce 0.1", 24), ("ties 0.6", 3), ("linear", 3)):
        row = plan_merge(name.split()[0], replace(small, layers=layers), 5, 1, fast_disk, 0)
        measured = float(kept("merge")[name]["note"].split()[0])
        assert row.seconds == pytest.approx(measured, rel=0.02)


def test_packing_is_priced_by_real_lengths() -> None:
    even = Lengths(n_dialogues=100, sample=np.full(100, 30), row_share=1.0, distinct_ids=9)
    assert even.padded_share(4) == pytest.approx(1.0)
    spread = Lengths(n_dialogues=100, sample=np.array([10] * 99 + [1000]), row_share=1.0, distinct_ids=9)
    assert spread.padded_share(4) > 2
    assert spread.padded_share(1) == pytest.approx(1.0)
