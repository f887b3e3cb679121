"""A whole run: resumes after a kill in any stage with identical results, skips what is done, refuses what changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_world import write_run
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.commands.results import print_results
from fusechat.config import load_config
from fusechat.errors import FormatError, FusechatError, MismatchError, Stopped
from fusechat.evaluate.bpb import NATS_PER_BIT, Scores, score_dialogues
from fusechat.evaluate.run_scores import out_of_reach, scoring_of, scoring_options
from fusechat.inspect import describe, sample_rows
from fusechat.run import run
from fusechat.split import load_split
from fusechat.store import ALIGNED_FORMAT, TOPK_FORMAT, Store

ROOT = Path(__file__).resolve().parents[1]

# Dies by SIGKILL inside the stage named on the command line, at a moment when its work is half done.
KILLER = """
import os, pathlib, signal, sys
import fusechat.artifact as artifact
stage, config = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if stage in ("extract", "align"):
    write_shard = artifact.write_shard
    def counted(directory, *args, **facts):
        if directory.parent.name == stage and len(list(directory.glob("*.safetensors"))) == 2:
            die()
        return write_shard(directory, *args, **facts)
    artifact.write_shard = counted
elif stage == "train":
    import fusechat.train.callbacks as trainer
    on_save = trainer.MarkComplete.on_save
    def second(self, args, state, control, **kwargs):
        if state.global_step >= 4:
            # As if the kill had come in the middle of writing this checkpoint: half of it, and no mark.
            (pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}" / "trainer_state.json").unlink()
            die()
        on_save(self, args, state, control, **kwargs)
    trainer.MarkComplete.on_save = second
elif stage == "merge":
    replace = pathlib.Path.replace
    rename = os.rename
    def last(self, target):
        if pathlib.Path(target).name == "merged":
            die()
        return replace(self, target)
    def last_rename(source, target, **options):
        if pathlib.Path(target).name == "merged":
            die()
        return rename(source, target, **options)
    pathlib.Path.replace = last
    os.rename = os.replace = last_rename
from fusechat.run import run
run(config)
"""


def _checksums(out: Path) -> dict[str, str]:
    """Everything a run leaves that carries a result; manifests name absolute paths, so they are compared by value."""
    sums = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".safetensors":
            sums[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    groups = json.loads((out / "results.json").read_text())["groups"]
    sums["results"] = json.dumps(groups)
    return sums


@pytest.fixture(scope="module")
def finished(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    run(write_run(tiny_world, out))
    return out


def test_a_run_leaves_every_artefact_and_nothing_half_done(finished: Path) -> None:
    assert not list(finished.rglob("*.partial"))
    for name in ("extract/pivot", "extract/source", "align/source", "targets/source", "targets/sft", "merged"):
        describe(finished / name)
    results = json.loads((finished / "results.json").read_text())
    assert set(results["groups"]) == {"overall", "a", "b"}
    assert set(results["groups"]["overall"]["models"]) == {
        "pivot", "source source", "target source", "sft", "merged",
    }  # fmt: skip


def test_the_merged_model_loads_and_training_moved_it(finished: Path, tiny_world: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(finished / "merged")
    pivot = AutoModelForCausalLM.from_pretrained(tiny_world.pivot)
    assert AutoTokenizer.from_pretrained(finished / "merged").chat_template
    moved = [not torch.equal(a, b) for a, b in zip(merged.parameters(), pivot.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_killed_run_resumes_to_identical_bytes(finished: Path, tiny_world: Any, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    config = write_run(tiny_world, out)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for stage in ("extract", "align", "train", "merge"):
        done = subprocess.run(
            [sys.executable, "-c", KILLER, stage, str(config)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == -9, f"{stage}: {done.stderr[-2000:]}"
        assert not (out / "results.json").exists()
    run(config)
    assert _checksums(out) == _checksums(finished)


def test_a_second_run_does_nothing_over(finished: Path, tiny_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.suffix in (".safetensors", ".json")}
    results = run(write_run(tiny_world, finished))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert results["groups"]


def test_changed_inputs_are_refused_naming_both_sides(finished: Path, tiny_world: Any) -> None:
    config = write_run(tiny_world, finished)
    before = (finished / "config.yaml").read_bytes()
    with pytest.raises(MismatchError, match="top_k: 4 there, 5 here"):
        run(config, ["extract.top_k=5"])
    with pytest.raises(MismatchError, match=r"hard_weight: 0\.5 there, 0\.7 here"):
        run(config, ["train.hard_weight=0.7"])
    with pytest.raises(MismatchError, match="dataset_fingerprint"):
        run(config, ["data.limit=10"])
    with pytest.raises(MismatchError):
        run(config, ["seed=4"])
    assert (finished / "config.yaml").read_bytes() == before, "what is read by it must stay what was trained on"


def test_settings_are_noted_before_a_target_trains_by_them(
    finished: Path, tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a report of a run under way with the settings of the last one, and a refusal after hours of training."""
    out = shutil.copytree(finished, tmp_path / "whole")
    config = write_run(tiny_world, out)

    def noted() -> Any:
        return yaml.safe_load((out / "config.yaml").read_text())["train"]["hard_weight"]

    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped

    monkeypatch.setattr("fusechat.train.train", stopped)
    shutil.rmtree(out / "merged")
    shutil.rmtree(out / "targets" / "source")
    with pytest.raises(MismatchError, match=r"targets/sft was trained .*hard_weight: 0\.5 there, 0\.7 here"):
        run(config, ["train.hard_weight=0.7"])
    assert noted() == 0.5
    unfinished = out / "targets" / "sft.partial"
    unfinished.mkdir()
    request = json.loads((out / "targets" / "sft" / "provenance.json").read_text())["request"]
    (unfinished / "request.json").write_text(json.dumps(request))
    shutil.rmtree(out / "targets" / "sft")
    with pytest.raises(MismatchError, match=r"targets/sft\.partial was trained"):
        run(config, ["train.hard_weight=0.7"])
    assert noted() == 0.5
    shutil.rmtree(unfinished)
    with pytest.raises(Stopped):
        run(config, ["train.hard_weight=0.7"])
    assert noted() == 0.7


def test_settings_that_change_no_result_are_noted_when_all_stages_accept_them(finished: Path, tiny_world: Any) -> None:
    results = run(write_run(tiny_world, finished), ["extract.batch_tokens=4096"])
    assert yaml.safe_load((finished / "config.yaml").read_text())["extract"]["batch_tokens"] == 4096
    assert run(write_run(tiny_world, finished)) == results


def test_scores_are_kept_and_a_source_that_cannot_be_scored_is_named(
    finished: Path, tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a finished fusion that ends without a table because one source does not fit, and scores made twice; and
    a mistake in this code that is told as the source's."""
    import torch

    out, asked, stop = tmp_path / "run", [], [True]
    faults = [TypeError("a mistake of ours"), RuntimeError("size of tensor a must match"), KeyError("x")]
    shutil.copytree(finished, out)
    for name in ("results.json", "scores.json", "report.html"):
        (out / name).unlink()

    def score(model: str, dialogues: Any, **options: Any) -> Scores:
        asked.append(Path(model).name)
        assert options["device"] == "cpu"
        if model == str(tiny_world.source):
            raise faults.pop(0) if faults else torch.OutOfMemoryError("CUDA out of memory\nand more")
        if model == str(out / "merged") and stop:
            stop.clear()
            raise KeyboardInterrupt
        return score_dialogues(model, dialogues, **options)

    monkeypatch.setattr("fusechat.evaluate.run_scores.score_dialogues", score)
    config = load_config(write_run(tiny_world, out), ["extract.device=cpu"])
    for fault in list(faults):
        with pytest.raises(type(fault)):
            run(config)
    assert asked == ["pivot", "source", "source", "source"]
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert asked == ["source", "source", "sft", "merged"]
    results = run(config)
    assert asked[4:] == ["source", "merged"]
    whole_reason = (out / "not_scored.log").read_text()
    assert whole_reason.startswith("source source is not scored\nTraceback")
    assert "CUDA out of memory\nand more" in whole_reason
    assert results["not_scored"] == {"source source": "CUDA out of memory"}
    assert list(results["groups"]["overall"]["models"]) == ["pivot", "target source", "sft", "merged"]
    whole = json.loads((finished / "results.json").read_text())["groups"]["overall"]["models"]
    assert results["groups"]["overall"]["models"]["merged"]["bits_per_byte"] == whole["merged"]["bits_per_byte"]
    assert "source source is not scored: CUDA out of memory." in (out / "report.md").read_text()
    assert not (out / "scored.json").exists()
    assert run(config) == results
    assert len(asked) == 6
    print_results(results)


def test_a_source_is_scored_as_it_was_extracted(tiny_world: Any, tmp_path: Path) -> None:
    """Catches a source that is scored on another device, in another dtype, or as weights that nobody extracted."""
    config = load_config(write_run(tiny_world, tmp_path / "x"), [
        "extract.device=cpu",
        "sources=[{model: a, extract: {dtype: bfloat16, batch_tokens: 77, device: 'cuda:1', max_length_tokens: 9}},"
        "{model: b, extract: {backend: vllm, tensor_parallel_size: 2}},"
        "{model: c, extract: {backend: vllm, quantization: fp8}},"
        "{model: d, extract: {backend: vllm-server, servers: ['http://h:1']}},"
        "{model: e, extract: {backend: vllm}}]",
    ])  # fmt: skip
    a, b, c, d, e = config.sources
    common = {"template": "own", "max_length_tokens": 200, "device_map": None}
    on_cpu = common | {"dtype": "auto", "device": "cpu", "batch_tokens": 8192}
    assert scoring_options(config) == on_cpu
    assert scoring_options(config, a) == common | {"dtype": "bfloat16", "device": "cuda:1", "batch_tokens": 77}
    assert scoring_options(config, b) == on_cpu | {"device": "auto", "device_map": "auto"}
    assert scoring_options(config, e)["device_map"] is None
    (store := tmp_path / "x" / "extract" / "e").mkdir(parents=True)
    (store / "manifest.json").write_text('{"engines": [{"name": "vllm", "tensor_parallel_size": 4}]}')
    assert scoring_options(config, e)["device_map"] == "auto"  # as many as hold it, which the GPUs decided
    assert [out_of_reach(config, source) for source in (a, b)] == [None, None]
    assert out_of_reach(config, c) == "only vLLM quantises it to fp8"
    assert out_of_reach(config, d) == "a server has it"
    assert (scoring_of(config, "a"), scoring_of(config, "x")) == (scoring_options(config, a), on_cpu)


def test_runs_may_share_their_stores(finished: Path, tiny_world: Any, tmp_path: Path) -> None:
    """Catches a second run that extracts and aligns again what the first has, and a report that does not find it."""
    stores = [path for kind in ("extract", "align") for path in (finished / kind).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in stores}
    out = tmp_path / "short"
    run(write_run(tiny_world, out), [f"stores={finished}", "train.max_steps=1"])
    assert {path.name for path in out.iterdir()}.isdisjoint({"extract", "align"})
    stores = [path for kind in ("extract", "align") for path in (finished / kind).rglob("*")]
    assert {path: path.stat().st_mtime_ns for path in stores} == before
    report = json.loads((out / "report.json").read_text())
    assert report["sources"]["by_source"].keys() == report["alignment"]["by_source"].keys() == {"source"}
    with pytest.raises(MismatchError, match="top_k: 4 there, 5 here"):
        run(write_run(tiny_world, tmp_path / "other"), [f"stores={finished}", "extract.top_k=5"])


def test_every_model_is_scored_in_the_template_it_was_fused_in(tiny_world: Any, tmp_path: Path) -> None:
    """Catches a pivot trained in a template of the user's and scored in its own, and a base model that has none."""
    plain, jinja, out = tmp_path / "plain", tmp_path / "chat.jinja", tmp_path / "run"
    shutil.copytree(tiny_world.source, plain)
    (plain / "chat_template.jinja").unlink()
    jinja.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    overrides = [
        f"extract.template={jinja}", f"sources=[{{model: {plain}, extract: {{template: pivot}}}}]",
        "merge.sweep=[{merge_method: linear, parameters: {weight: 1.0}}]", "train.max_steps=1",
    ]  # fmt: skip
    config = load_config(write_run(tiny_world, out), overrides)
    results = run(config)
    split = load_split(config)

    def bits(model: Path, template: Path | str, dialogues: Any = split.held_out) -> Any:
        scores = score_dialogues(str(model), dialogues, template=str(template), max_length_tokens=200)
        return pytest.approx(scores.nll.sum() / NATS_PER_BIT / scores.content_bytes.sum(), rel=1e-5)

    models = results["groups"]["overall"]["models"]
    found = {name: model["bits_per_byte"][0] for name, model in models.items()}
    assert found["pivot"] == bits(tiny_world.pivot, jinja)
    assert found["pivot"] != bits(tiny_world.pivot, "own")
    assert found["source plain"] == bits(plain, tiny_world.pivot)
    for name, place in (("target plain", "targets/plain"), ("sft", "targets/sft"), ("merged", "merged")):
        assert found[name] == bits(out / place, jinja)
    (chosen,) = json.loads((out / "merged" / "sweep.json").read_text())["merges"].values()
    assert chosen["bits_per_byte"][0] == bits(out / "merged", jinja, split.validation)
    assert run(config) == results
    asked = [str(tiny_world.pivot), str(plain), str(out / "merged"), "--data", str(out)]
    done = CliRunner().invoke(app, ["eval", "bpb", *asked, "--json", str(tmp_path / "bpb.json")])
    assert done.exit_code == 0, done.output
    again = json.loads((tmp_path / "bpb.json").read_text())["groups"]["overall"]["models"]
    for name, named in (("pivot", "pivot"), ("plain", "source plain"), ("merged", "merged")):
        assert again[name]["bits_per_byte"][0] == found[named]


def test_a_second_run_of_the_same_folder_waits_for_the_first(finished: Path, tiny_world: Any, tmp_path: Path) -> None:
    """Catches two runs that train into one folder."""
    out = shutil.copytree(finished, tmp_path / "run")
    hold = (
        "import sys; from fusechat.artifact import lock_directory as l; from pathlib import Path; l(Path(sys.argv[1]))"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", hold + "; print(flush=True); sys.stdin.read()", str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert first.stdout is not None
    first.stdout.readline()
    with pytest.raises(FusechatError, match="is being written by another run: wait for it"):
        run(write_run(tiny_world, out))
    first.communicate()
    assert run(write_run(tiny_world, out))
    assert not (out / "writing.lock").exists()


def test_stores_show_a_readable_sample(finished: Path) -> None:
    with pytest.raises(FormatError, match=r"is the folder of a run: `fusechat report .*results\.json"):
        describe(finished)
    for name, kind in (("extract/source", TOPK_FORMAT), ("align/source", ALIGNED_FORMAT)):
        assert describe(finished / name)[0] == kind
        rows = sample_rows(Store(finished / name, kind), limit=5)
        assert len(rows) == 5
        assert all(len(row) == 5 for row in rows)


def test_an_aligned_store_of_another_pivot_store_is_refused(finished: Path, tiny_world: Any, tmp_path: Path) -> None:
    from fusechat.train import train

    shutil.copytree(finished / "extract" / "pivot", tmp_path / "pivot")
    manifest = json.loads((tmp_path / "pivot" / "manifest.json").read_text())
    (tmp_path / "pivot" / "manifest.json").write_text(json.dumps(manifest | {"top_k": 3}))
    with pytest.raises(MismatchError, match="another pivot store"):
        train(tiny_world.pivot, str(tmp_path / "pivot"), str(finished / "align" / "source"), str(tmp_path / "t"))
