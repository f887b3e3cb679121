"""The plan of extraction: over which GPUs, in what room, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusechat.config import RunConfig, load_config
from fusechat.plan import Plan, plan
from fusechat.plan.hardware import load_hardware
from fusechat.plan.projection import papers_config
from fusechat.plan.stage import StagePlan
from fusechat.plan.workload import Lengths
from fusechat.recipe import recipe_path


@pytest.fixture(scope="module")
def paper() -> RunConfig:
    return papers_config()


def stage(result: Plan, what: str, name: str) -> StagePlan:
    return next(s for s in result.stages if (s.stage, s.name) == (what, name))


def test_more_memory_needs_fewer_gpus_for_a_large_source(paper: RunConfig) -> None:
    widths = [
        stage(plan(paper, load_hardware("h200", memory_bytes=size)), "extract", "qwen").settings["tensor_parallel_size"]
        for size in (40_000_000_000, 80_000_000_000, 141_000_000_000)
    ]
    assert widths == sorted(widths, reverse=True)  # type: ignore[type-var]
    assert widths[0] > widths[-1]  # type: ignore[operator]


def test_a_source_too_large_for_every_split_is_told_to_be_quantised(paper: RunConfig) -> None:
    result = plan(paper, load_hardware("a100-40", gpus=2))
    changes = " ".join(stage(result, "extract", "qwen").changes)
    assert "quantised to int4, on 2 GPUs" in changes
    assert "vllm-server" in changes


@pytest.mark.parametrize(
    ("gpus", "options", "engines"),
    [(1, {}, 1), (8, {}, 8), (8, {"engines": 3}, 3), (8, {"device_map": "auto"}, 1), (4, {"device": "cuda:1"}, 1)],
)
def test_transformers_extract_on_every_gpu(paper: RunConfig, gpus: int, options: dict[str, Any], engines: int) -> None:
    def pivot(gpus: int, **update: Any) -> StagePlan:
        extract = paper.extract.model_copy(update={"backend": "hf", **update})
        return stage(
            plan(paper.model_copy(update={"extract": extract}), load_hardware("h200", gpus=gpus)), "extract", "pivot"
        )

    one, found = pivot(1), pivot(gpus, **options)
    assert found.settings["engines"] == found.devices == engines
    assert found.seconds == pytest.approx(one.seconds / engines)
    assert found.host_bytes == engines * one.host_bytes
    assert found.device_parts == one.device_parts


def test_a_gpu_holds_the_whole_embedding(paper: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan that leaves out, on a GPU, too, the rows that a CPU never reads from the file."""
    few = Lengths(n_dialogues=9, sample=np.full(9, 500), row_share=0.75, distinct_ids=9)
    monkeypatch.setattr("fusechat.plan.lengths", lambda *_: (few, ""))
    monkeypatch.setattr("fusechat.plan.process_bytes", lambda stages: dict.fromkeys(stages, 0))
    asked = paper.model_copy(update={"extract": paper.extract.model_copy(update={"backend": "hf"})})
    weights = {
        name: stage(plan(asked, load_hardware(name)), "extract", "pivot") for name in ("h200", "cpu")
    }  # fmt: skip
    assert weights["h200"].device_parts["weights"] == 2 * 7_241_748_480
    assert weights["cpu"].host_parts["weights"] == 2 * (7_241_748_480 - (32_002 - 9) * 4096)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device_map": "cpu"}])
def test_extraction_on_a_gpu_machine_s_processor_takes_no_gpu(paper: RunConfig, options: dict[str, Any]) -> None:
    extract = paper.extract.model_copy(update={"backend": "hf", **options})
    result = plan(paper.model_copy(update={"extract": extract}), load_hardware("h200"))
    found = stage(result, "extract", "pivot")
    assert (found.devices, found.device_bytes) == (0, 0)
    assert found.host_bytes > 2 * 7_241_748_480
    assert found.host_limit_bytes == result.hardware.host_memory_bytes
    assert found.seconds > 10 * stage(plan(paper, load_hardware("h200")), "extract", "pivot").seconds


@pytest.mark.parametrize(
    ("options", "refused", "mend"),
    [
        ({"tensor_parallel_size": 1}, "", "extract.tensor_parallel_size: 8"),
        ({"tensor_parallel_size": 16}, "1 × 16 GPUs asked for, 8 there", "extract.tensor_parallel_size: 8"),
        ({"tensor_parallel_size": 3}, "cannot divide 64 heads among 3 GPUs", "extract.tensor_parallel_size: 8"),
        ({"engines": 2}, "2 × 8 GPUs asked for, 8 there", "extract.engines: 1"),
        ({"tensor_parallel_size": 8}, "", None),
    ],
)
def test_what_is_asked_of_vllm_is_judged_as_it_is(
    paper: RunConfig, options: dict[str, Any], refused: str, mend: str | None
) -> None:
    """Catches a plan that fits by a size the run does not take."""
    extract = paper.extract.model_copy(update=options)
    result = plan(paper.model_copy(update={"extract": extract}), load_hardware("a100-40"))
    row = stage(result, "extract", "qwen")
    assert row.settings["tensor_parallel_size"] == options.get("tensor_parallel_size", 8)
    assert row.fits == (mend is None)
    assert refused in row.refused
    assert row.changes == (() if mend is None else (mend,))


def test_vllm_must_have_room_within_its_share(paper: RunConfig) -> None:
    """The parts add up to less than a GPU, but what vLLM counts is more than it takes."""
    row = stage(plan(paper, load_hardware("h200", gpus=1, memory_bytes=27_000_000_000)), "extract", "solar")
    assert row.device_bytes <= row.device_limit_bytes
    assert "vLLM takes 22.9 GB of a GPU" in row.refused
    assert not row.fits


def test_quantisation_that_is_asked_for_is_counted(paper: RunConfig) -> None:
    def qwen(shape: str, **options: Any) -> StagePlan:
        extract = paper.extract.model_copy(update=options)
        return stage(plan(paper.model_copy(update={"extract": extract}), load_hardware("a100-80")), "extract", shape)

    plain, fp8, nf4 = (qwen("qwen", quantization=method) for method in (None, "fp8", "bitsandbytes"))
    sizes = [row.settings["tensor_parallel_size"] for row in (plain, fp8, nf4)]
    assert sizes == [4, 2, 1]
    whole = [row.device_parts["weights"] * size for row, size in zip((plain, fp8, nf4), sizes)]  # type: ignore[operator]
    ends = 2 * 152_064 * 8192  # embedding and head, which stay as they are
    assert whole[0] - whole[1] == pytest.approx(whole[0] / 2 - ends, rel=1e-6)
    assert whole[0] - whole[2] == pytest.approx(0.75 * (whole[0] - 2 * ends), rel=1e-6)


def test_a_model_that_brings_code_is_refused_until_it_is_trusted(paper: RunConfig) -> None:
    wary = load_config(recipe_path("recipe:fusechat_7b_v2"))
    row = stage(plan(wary, load_hardware("a100-40")), "extract", "internlm")
    assert not row.fits
    assert "no internlm2" in row.refused
    assert row.changes[0].startswith("extract.trust_remote_code: true")
    assert stage(plan(paper, load_hardware("a100-40")), "extract", "internlm").fits
    as_pivot = paper.model_copy(update={"pivot": "internlm/internlm2-chat-20b", "sources": paper.sources[:2]})
    assert not stage(plan(as_pivot, load_hardware("h200")), "train", "solar").fits, "training runs no code of a model's"
