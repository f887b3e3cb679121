"""The demo's world: dialogues that follow their facts, tokenizers of four kinds, models that are made once."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fusechat.commands.demo import demo
from fusechat.config import load_config, source_name
from fusechat.demo import world as world_module
from fusechat.demo.fusion import write_config
from fusechat.demo.grammar import MEMBERS, TOPICS, ZIPF_EXPONENT, Facts, dialogues
from fusechat.demo.tokenizers import KINDS
from fusechat.demo.world import PIVOT, SOURCES, World, build_world
from fusechat.dialogue import dialogue_key, load_dialogues
from fusechat.errors import MismatchError
from fusechat.layout import Layout

EVEN = dict.fromkeys(TOPICS, 1.0)


def test_dialogues_depend_on_seed_and_name_only() -> None:
    """Catches a hash of the process, or a draw outside the given generator, in the data."""
    first = dialogues(Facts(3), EVEN, 50, "train")
    assert dialogues(Facts(3), EVEN, 50, "train") == first
    assert dialogues(Facts(3), EVEN, 50, "held_out") != first
    assert dialogues(Facts(4), EVEN, 50, "train") != first
    assert {d.category for d in first} == set(TOPICS)
    for d in first:
        assert [m.role for m in d.messages] == ["user", "assistant"] * (len(d.messages) // 2)
    assert any(len(d.messages) > 2 for d in first)


def test_draws_follow_the_conditions_distribution() -> None:
    """Catches a world without facts: the order must hold for a condition, differ between two, and be Zipf's."""
    facts, items = Facts(1), MEMBERS["fruits"]
    rng = random.Random(0)
    counts = Counter(facts.one(rng, items, "here") for _ in range(4000))
    expected = [1.0 / rank**ZIPF_EXPONENT for rank in range(1, len(items) + 1)]
    for (_, count), share in zip(counts.most_common(3), expected):
        assert count / 4000 == pytest.approx(share / sum(expected), abs=0.03)
    tops = {Counter(facts.one(rng, items, str(c)) for _ in range(200)).most_common(1)[0][0] for c in range(8)}
    assert len(tops) > 2
    flat = Counter(Facts(1, zipf_exponent=0.0).one(rng, items, "here") for _ in range(4000))
    assert max(flat.values()) < 1.4 * min(flat.values())
    assert len(set(facts.draw(rng, items, "here", count=len(items)))) == len(items)


def test_the_first_page_names_what_the_demo_leaves(tmp_path: Path) -> None:
    """Catches a how-to whose commands end in "does not exist"; the demo itself takes minutes."""
    page = Path(__file__).resolve().parents[1] / "docs" / "howto" / "first-run.md"
    named = set(re.findall(r"fusechat-demo/[\w./-]*\w", page.read_text(encoding="utf-8")))
    out = inspect.signature(demo).parameters["out"].default
    world = World(
        pivot=tmp_path, sources={spec.name: tmp_path for spec in SOURCES}, train=tmp_path, held_out=tmp_path, topics={}
    )
    config = write_config(world, tmp_path, seed=0)
    settings = load_config(config)
    run = out / Path(settings.out).relative_to(tmp_path.resolve())
    layout = Layout(out=run)
    source = source_name(settings.sources[-1])
    left = {run, layout.store("pivot"), layout.aligned(source), layout.merged, layout.results, out / config.name}
    assert named == {str(path) for path in left}


def test_sums_are_right() -> None:
    """Catches a grammar that teaches wrong arithmetic."""
    for d in dialogues(Facts(0), {"sums": 1.0}, 200, "x"):
        words = d.messages[1].content.replace(".", " ").replace(",", " ").split()
        at = words.index("=")
        a, operator, b, result = words[at - 3], words[at - 2], words[at - 1], words[at + 1]
        assert int(result) == (int(a) + int(b) if operator == "+" else int(a) - int(b))


@pytest.mark.parametrize("kind", list(KINDS))
def test_tokenizers_are_the_same_at_every_training_and_spell_anything(kind: str) -> None:
    """Catches a vocabulary that changes from run to run, which would break every hash of a run."""
    texts = [m.content for d in dialogues(Facts(0), EVEN, 200, "t") for m in d.messages]
    first, second = (KINDS[kind](texts, 700) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) <= 700
    for text in ("Take two cups of rice.", "Ein Stück für 5 €, 你好 🦙"):
        ids = first(text, add_special_tokens=False)["input_ids"]
        assert first.unk_token_id not in ids
        assert first.decode(ids) == text


def test_the_world_is_of_three_architectures_sizes_and_four_tokenizers() -> None:
    """Catches a world in which two models could be fused without alignment, or the pivot is not the smallest."""
    assert len({spec.architecture for spec in SOURCES}) == len({spec.hidden for spec in SOURCES}) == 3
    assert {spec.tokenizer for spec in (PIVOT, *SOURCES)} == set(KINDS)
    assert all(spec.hidden > PIVOT.hidden for spec in SOURCES)
    assert sorted(topic for spec in SOURCES for topic in spec.topics) == sorted(TOPICS)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world with models that are trained for two steps."""
    small = {"train_dialogues": 20, "hidden": 32, "layers": 1}
    monkeypatch.setattr(world_module, "PIVOT", replace(PIVOT, **small))
    monkeypatch.setattr(world_module, "SOURCES", tuple(replace(spec, **small) for spec in SOURCES))


@pytest.mark.usefixtures("small_world")
def test_a_world_is_made_once_and_the_same_again(tmp_path: Path) -> None:
    """Catches models trained anew although nothing changed, taken from the cache although something did, or damaged."""
    seen: list[tuple[int, int]] = []
    world = build_world(tmp_path / "a", seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)
    assert set(world.sources) == set(world.topics)
    train, held_out = load_dialogues(world.train), load_dialogues(world.held_out)
    assert len(held_out) == world_module.HELD_OUT_DIALOGUES
    assert {d.category for d in held_out} == set(TOPICS)
    assert not {dialogue_key(d) for d in train} & {dialogue_key(d) for d in held_out}
    weights = {p: (p / "model.safetensors").read_bytes() for p in (world.pivot, *world.sources.values())}
    times = {p: (p / "model.safetensors").stat().st_mtime_ns for p in weights}

    build_world(tmp_path / "a", seed=0)
    assert {p: (p / "model.safetensors").stat().st_mtime_ns for p in weights} == times
    (world.pivot / "model.safetensors").write_bytes(b"damaged")
    build_world(tmp_path / "a", seed=0)
    assert {p: (p / "model.safetensors").read_bytes() for p in weights} == weights
    note = json.loads((world.pivot / "demo.json").read_text())
    assert note["key"] == world_module._key(world_module.PIVOT, 0) != world_module._key(world_module.PIVOT, 1)


@pytest.mark.usefixtures("small_world")
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    """Catches a model of the user's overwritten by the demo's."""
    (tmp_path / "pivot").mkdir()
    (tmp_path / "pivot" / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match="pivot exists and is not a model of the demo"):
        build_world(tmp_path, seed=0)
    assert (tmp_path / "pivot" / "thesis.txt").read_text() == "mine"
