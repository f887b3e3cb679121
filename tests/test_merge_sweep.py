"""Sweeps: which merges they are, which is chosen, what is left on disk, and that a stopped one goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from merge_family import checksums, make_family, random_tensors, read_all, recipe, write_model
from rich.console import Console

from fusechat.commands import sweep as sweep_command
from fusechat.commands.merge import merge as merge_command
from fusechat.config import load_config
from fusechat.errors import ConfigError, MismatchError
from fusechat.evaluate import bpb
from fusechat.merge import merge
from fusechat.merge import sweep as sweep_module
from fusechat.merge.sweep import candidates, load_sweep, sweep
from fusechat.records import Dialogue, Message
from fusechat.run import run

ENTRIES: list[Any] = [
    {"merge_method": "linear", "parameters": {"weight": 1.0}},
    {"merge_method": "sce", "parameters": {"variant": "paper"}, "each": {"select_topk": [0.1, 1.0]}},
]
NAMES = ["linear weight=1.0", "sce variant=paper select_topk=0.1", "sce variant=paper select_topk=1.0"]
VALIDATION = [
    Dialogue(messages=(Message(role="user", content=f"{i}?"), Message(role="assistant", content="yes" * (1 + i))))
    for i in range(20)
]


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and three targets."""
    return make_family(tmp_path)


@pytest.fixture
def scored(family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the evaluation: the closer to the linear merge a model's norm weights are, the better; logs its calls."""
    even = [model | {"parameters": {"weight": 1.0}} for model in _models(family)]
    merge(recipe(family, "linear", models=even), family["base"].with_name("ideal"))
    ideal = read_all(family["base"].with_name("ideal"))["model.norm.weight"]
    calls: list[str] = []

    def score(model: str, dialogues: Any, **_: Any) -> bpb.Scores:
        calls.append(Path(model).name)
        distance = float(np.abs(read_all(Path(model))["model.norm.weight"] - ideal).sum())
        size = np.array([len(d.messages[1].content) for d in dialogues])
        return bpb.Scores(nll=size * (1 + distance) + np.sin(np.arange(len(size))) * 0.01, content_bytes=size)

    monkeypatch.setattr(bpb, "score_dialogues", score)
    return calls


def _models(family: dict[str, Path]) -> list[dict[str, Any]]:
    return [{"model": str(path)} for name, path in family.items() if name != "base"]


def _recipe(family: dict[str, Path]) -> dict[str, Any]:
    return {"base_model": str(family["base"]), "models": _models(family)}


def test_entries_are_multiplied_and_checked(family: dict[str, Path]) -> None:
    """Catches a combination that is left out, a weight that reaches no model, and errors that come after an hour."""
    found = candidates(_recipe(family), ENTRIES)
    assert [c.name for c in found] == NAMES
    assert [m["parameters"] for m in found[0].recipe["models"]] == [{"weight": 1.0}] * 3
    assert found[1].recipe["parameters"] == {"variant": "paper", "select_topk": 0.1}
    both = [{"merge_method": "ties", "each": {"weight": [1.0, 2.0], "density": [0.5, 0.6, 0.7]}}]
    assert len(candidates(_recipe(family), both)) == 6
    for entry, message in [
        ({"merge_method": "sec"}, "did you mean `sce`"),
        ({"merge_method": "sce", "parameter": {}}, "did you mean `parameters`"),
        ({"merge_method": "sce", "parameters": {"density": 0.1}}, r"sweep\[0\]: unknown parameter"),
        ({"merge_method": "sce", "each": {"select_topk": 0.1}}, "lists of values"),
        ({"merge_method": "sce", "each": {"select_topk": [0.1, 7]}}, "between 0 and 1"),
        ("sce", "must have a `merge_method`"),
    ]:
        with pytest.raises(ConfigError, match=message):
            candidates(_recipe(family), [entry])


def test_the_best_is_left_with_its_table(family: dict[str, Path], scored: list[str], tmp_path: Path) -> None:
    """Catches the wrong winner, weights that differ from the plain merge's, and losers that fill the disk."""
    out = tmp_path / "out"
    table = sweep(_recipe(family), ENTRIES, out, VALIDATION)
    assert table["best"] == NAMES[0]
    assert len(scored) == 3
    assert not (tmp_path / "out.sweep").exists()
    rows = table["merges"]
    assert list(rows) == NAMES
    assert table["request"]["scoring"]["template"] == "own"
    assert rows[NAMES[0]]["difference_to_best"] == [0, 0, 0]
    value, low, high = rows[NAMES[1]]["difference_to_best"]
    assert 0 < low <= value <= high
    nll = [read_all(out)["model.norm.weight"]]  # the winner itself, not its score alone
    merge(candidates(_recipe(family), ENTRIES)[0].recipe, tmp_path / "plain")
    np.testing.assert_array_equal(nll[0], read_all(tmp_path / "plain")["model.norm.weight"])
    assert checksums(out)["model.safetensors"] == checksums(tmp_path / "plain")["model.safetensors"]
    assert sweep(_recipe(family), ENTRIES, out, VALIDATION) == table
    assert len(scored) == 3
    with pytest.raises(MismatchError, match=r"other inputs \(recipes"):
        sweep(_recipe(family), ENTRIES[1:], out, VALIDATION)
    with pytest.raises(MismatchError, match=r"other inputs \(validation"):
        sweep(_recipe(family), ENTRIES, out, VALIDATION[1:])
    with pytest.raises(MismatchError, match=r"other inputs \(options"):
        sweep(_recipe(family), ENTRIES, out, VALIDATION, allow_nonfinite=True)
    write_model(family["a"], random_tensors(9), shards=3)
    with pytest.raises(MismatchError, match=r"other inputs \(models_sha256"):
        sweep(_recipe(family), ENTRIES, out, VALIDATION)


def test_keep_all_keeps_the_others(family: dict[str, Path], scored: list[str], tmp_path: Path) -> None:
    """Catches a loser that is removed although it was asked for."""
    sweep(_recipe(family), ENTRIES, tmp_path / "out", VALIDATION, keep_all=True)
    kept = sorted(path.name for path in (tmp_path / "out.sweep").iterdir() if path.is_dir())
    assert kept == ["sce-variant=paper-select_topk=0.1", "sce-variant=paper-select_topk=1.0"]


def test_two_models_at_most_are_on_disk_and_a_stopped_sweep_goes_on(
    family: dict[str, Path], scored: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a disk that fills with the number of merges, and scores that are lost with the process."""
    real, most = bpb.score_dialogues, [0]

    def stop_at_the_third(model: str, dialogues: Any, **options: Any) -> bpb.Scores:
        most[0] = max(most[0], len(list((tmp_path / "out.sweep").glob("*/model.safetensors"))))
        if len(scored) == 2:
            raise KeyboardInterrupt
        return real(model, dialogues, **options)

    monkeypatch.setattr(bpb, "score_dialogues", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sweep(_recipe(family), ENTRIES, tmp_path / "out", VALIDATION)
    assert most[0] == 2
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(bpb, "score_dialogues", real)
    table = sweep(_recipe(family), ENTRIES, tmp_path / "out", VALIDATION)
    assert len(scored) == 3
    assert table["best"] == NAMES[0]


def test_a_stopped_sweep_goes_on_with_a_model_that_has_changed(
    family: dict[str, Path], scored: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a refusal of folders that are the sweep's own, and a merge of the old model that is taken for the new."""
    real = bpb.score_dialogues

    def stop_at_the_second(model: str, dialogues: Any, **options: Any) -> bpb.Scores:
        if scored:
            raise KeyboardInterrupt
        return real(model, dialogues, **options)

    monkeypatch.setattr(bpb, "score_dialogues", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sweep(_recipe(family), ENTRIES, tmp_path / "out", VALIDATION)
    write_model(family["a"], random_tensors(9, read_all(family["base"])), shards=3)
    monkeypatch.setattr(bpb, "score_dialogues", real)
    table = sweep(_recipe(family), ENTRIES, tmp_path / "out", VALIDATION)
    assert len(scored) == 1 + 3
    best = next(c for c in candidates(_recipe(family), ENTRIES) if c.name == table["best"])
    merge(best.recipe, tmp_path / "plain")
    assert checksums(tmp_path / "out")["model.safetensors"] == checksums(tmp_path / "plain")["model.safetensors"]


def test_the_file_form_and_the_printed_table(
    family: dict[str, Path], scored: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a `sweep` key that a plain merge ignores, and a table wider than a terminal."""
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(_recipe(family) | {"merge_method": "sce", "sweep": ENTRIES}))
    with pytest.raises(ConfigError, match="pass --sweep"):
        merge(path, tmp_path / "out")
    table = sweep(*load_sweep(path), tmp_path / "out", VALIDATION)
    printed = io.StringIO()
    monkeypatch.setattr(sweep_command, "Console", lambda: Console(file=printed, width=80))
    sweep_command.print_sweep(table)
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith(NAMES[0])
    path.write_text(yaml.safe_dump(_recipe(family)))
    with pytest.raises(ConfigError, match="needs a list `sweep`"):
        load_sweep(path)


def test_the_command_reads_and_renders_as_it_is_told(
    family: dict[str, Path], scored: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sweep that reads chats as another layout, or scores them in another template than was asked for."""
    real, seen = bpb.score_dialogues, []

    def score(model: str, dialogues: Any, **options: Any) -> bpb.Scores:
        seen.append((options["template"], len(dialogues)))
        return real(model, dialogues, **options)

    monkeypatch.setattr(bpb, "score_dialogues", score)
    path, data = tmp_path / "merge.yml", tmp_path / "chats"
    path.write_text(yaml.safe_dump(_recipe(family) | {"sweep": ENTRIES[:1]}))
    lines = [{"messages": [{"role": m.role, "content": m.content} for m in d.messages]} for d in VALIDATION]
    data.with_suffix(".jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    words = [str(path), str(tmp_path / "out"), "--sweep", "--data", f"{data}.jsonl"]
    merge_command([*words, "--format", "messages", "--template", "plain"])
    assert seen == [("plain", len(VALIDATION))]


@pytest.mark.slow
def test_on_real_models_small_tau_loses_and_the_choice_beats_sft(shared_data: Path, tmp_path: Path) -> None:
    """Catches a sweep that chooses badly: small τ with `paper` drops what was learned, and the choice must show a gain
    over SFT on text that neither training nor the choice has seen."""
    stories = Path(sweep_module.__file__).parents[1] / "recipes" / "stories.yaml"
    models = shared_data / "models"
    said = yaml.safe_load(stories.read_text())
    said["merge"] = {"sweep": [
        {"merge_method": "linear", "parameters": {"weight": 1.0}},
        {"merge_method": "sce", "parameters": {"variant": "paper"}, "each": {"select_topk": [0.1, 1.0]}},
    ]}  # fmt: skip
    (tmp_path / "stories.yaml").write_text(yaml.safe_dump(said))
    config = load_config(tmp_path / "stories.yaml", [
        f"pivot={models / 'aidreams231K'}",
        f"sources=[{models / 'stories260K'}, {models / 'babyllama-tok105'}]",
        f"data.train={shared_data / 'derived' / 'tinystories_dev.txt'}",
        f"out={tmp_path / 'run'}", "data.held_out_fraction=0.8", "data.limit=2000", "train.epochs=20",
    ])  # fmt: skip
    results = run(config)
    table = yaml.safe_load((tmp_path / "run" / "merged" / "sweep.json").read_text())
    small = table["merges"]["sce variant=paper select_topk=0.1"]
    assert small["difference_to_best"][1] > 1
    assert max(small["surviving_share"]) < 0.5
    merged = results["groups"]["overall"]["models"]["merged"]
    assert merged["difference_to_sft"][2] < 0
