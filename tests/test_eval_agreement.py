"""Shared places and agreement against definitions over dictionaries of byte strings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fusechat.bytetable import ByteTable, Role
from fusechat.cli import app
from fusechat.commands.evaluate.held_out import held_out
from fusechat.commands.evaluate.names import model_names
from fusechat.dialogue import load_dialogues, split_held_out
from fusechat.encode import encode_all
from fusechat.errors import ConfigError, DataError
from fusechat.evaluate.agreement import agreement
from fusechat.evaluate.shared_rows import measure_rows, prefix_agreement, row_places, twins
from fusechat.records import Encoded
from fusechat.template import load_template
from fusechat.tokenizer import load_tokenizer
from fusechat.turn_end import turn_end_token

WORDS = [b"a", b"b", b"ab", b"abc", b"c", b"a", b"ca", b"<end>"]
OTHER = [b"ab", b"c", b"c", b"a", b"zz", b"b", b"<|e|>", b"abcd"]


def _tables() -> tuple[ByteTable, ByteTable]:
    roles = [Role.TEXT] * 8
    return (
        ByteTable.from_tokens(WORDS, [*roles[:7], Role.TURN]),
        ByteTable.from_tokens(OTHER, [*roles[:6], Role.EOS, Role.TEXT]),
    )


def test_places_are_the_bytes_at_which_the_predicted_text_begins() -> None:
    encoded = Encoded(
        input_ids=np.arange(9, dtype=np.int32),
        loss_mask=np.array([0, 1, 1, 1, 1, 0, 1, 1, 1], bool),
        turn=np.array([-1, 0, 0, 0, 0, -1, 1, 1, 1], np.int32),
        byte_end=np.array([-1, 0, 2, 5, 5, -1, 3, 7, 7], np.int32),  # the first token has no width
    )
    places, positions = row_places(encoded)
    turn = 1 << 32
    assert places.tolist() == [0, 2, 5, turn, turn + 3, turn + 7]
    assert positions.tolist() == [1, 2, 3, 5, 6, 7]  # of the two rows at byte 0 the one that predicts its text


def test_twins_go_by_bytes_and_ends_of_turns_by_what_they_are_for() -> None:
    model, source = _tables()
    own, theirs = twins(model, 7, source, 6)
    assert own.tolist() == [0, 1, 2, 3, 4, 0, 6, 7]
    assert theirs.tolist() == [2, 4, 4, 0, -1, 1, 7, -1]
    own, theirs = twins(model, None, source, 6)
    assert (own[7], theirs[6]) == (7, -1)
    same_name = ByteTable.from_tokens([b"<end>", b"<end>"], [Role.OTHER, Role.TEXT])
    assert twins(model, None, same_name, None)[1].tolist() == [7, -1]  # special tokens go with special tokens only


def test_the_end_of_turns_is_the_special_token_that_ends_most() -> None:
    model, _ = _tables()

    def block(ids: list[int], turn: list[int], offsets: list[int]) -> tuple[np.ndarray, ...]:
        return np.array(ids, np.int32), np.array(turn, np.int32), np.array(offsets)

    assert turn_end_token([block([0, 1, 7, 2, 3, 7], [-1, 0, 0, -1, 1, 1], [0, 6])], model) == 7
    assert turn_end_token([block([7, 1, 2], [-1, 0, 0], [0, 3])], model) is None
    assert turn_end_token([block([1, 7, 2, 2], [0, 0, 0, 0], [0, 2, 4])], model) == 7  # two dialogues without a user


def _measure_slowly(
    own_top: list[int], full_p: np.ndarray, model: ByteTable, source_top: list[int], p: list[float], source: ByteTable
) -> dict[str, float]:
    """One row, by dictionaries from bytes (or "end") to probability."""

    def key(table: ByteTable, i: int) -> Any:
        return table.token(i) if table.roles[i] == Role.TEXT else "end"

    ours: dict[Any, float] = {}
    for i in range(len(model)):
        ours[key(model, i)] = ours.get(key(model, i), 0.0) + float(full_p[i])
    theirs: dict[Any, float] = {}
    for i, mass in zip(source_top, p, strict=True):
        if key(source, i) in ours:
            theirs[key(source, i)] = theirs.get(key(source, i), 0.0) + mass
    rest_p, rest_q = 1 - sum(theirs.values()), 1 - sum(ours[k] for k in theirs)
    kl = sum(m * np.log2(m / ours[k]) for k, m in theirs.items())
    kl += rest_p * np.log2(rest_p / rest_q)
    first, shown = key(source, source_top[0]), [key(model, i) for i in own_top]
    return {"top1": float(first == shown[0]), "topk": sum(k in shown for k in theirs) / len(theirs), "kl_bits": kl}


@given(st.integers(0, 10_000))
def test_measures_equal_their_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, source = _tables()
    own_twin, source_twin = twins(model, 7, source, 6)
    full_p = rng.dirichlet(np.ones(8))
    merged = np.zeros(8)
    np.add.at(merged, own_twin, full_p)
    own_top = np.argsort(-merged)[:3]
    source_top = rng.permutation([0, 1, 2, 3, 6])[:4]  # all have twins, 1 and 2 the same one
    p = np.sort(rng.dirichlet(np.ones(5)))[::-1][:4].copy()
    got = measure_rows(
        own_top[None],
        own_twin,
        source_top[None],
        source_twin,
        p[None],
        merged[np.maximum(source_twin[source_top], 0)][None],
    )
    slow = _measure_slowly(own_top.tolist(), full_p, model, source_top.tolist(), p.tolist(), source)
    for name, value in slow.items():
        assert got[name][0] == pytest.approx(value, abs=1e-9), name


def test_a_first_choice_that_begins_with_the_other_agrees_as_far_as_it_goes() -> None:
    model, source = _tables()
    own, theirs = np.array([[0], [3], [4], [7]]), np.array([[0], [7], [3], [6]])  # a/ab, abc/abcd, c/a, end/end
    got = prefix_agreement(own, model, theirs, source, np.array([0.0, 0.0, 0.0, 1.0]))
    assert got.tolist() == [1, 1, 0, 1]


def test_a_model_agrees_with_itself_on_every_row(tiny_world: Any) -> None:
    dialogues = load_dialogues(tiny_world.dialogues)[:6]
    table = agreement({"own": tiny_world.pivot}, {"same": tiny_world.pivot}, dialogues, top_k=4, samples=100)
    content = table["sources"]["same"]
    one = content["groups"]["overall"]["models"]["own"]
    assert content["shared_share"]["own"] == 1.0
    assert [one[key]["value"][0] for key in ("top1", "top1_prefix", "topk")] == [1, 1, 1]
    assert one["kl_bits"]["value"][0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("names", [("pivot", "source"), ("source", "pivot")])
@torch.no_grad()
def test_sums_equal_a_walk_over_every_row_with_full_distributions(tiny_world: Any, names: tuple[str, str]) -> None:
    """The source's vocabulary spells letters twice, as pieces and as bytes."""
    from transformers import AutoModelForCausalLM

    dialogues = load_dialogues(tiny_world.dialogues)[:8]
    seen: list[dict[tuple[int, int, int], np.ndarray]] = []
    tables = []
    folders = [getattr(tiny_world, name) for name in names]
    for folder in folders:
        tokenizer, lm = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
        table = ByteTable.from_tokenizer(tokenizer, lm.get_input_embeddings().weight.shape[0])
        found = encode_all(dialogues, tokenizer, table, template=load_template(tokenizer), max_length_tokens=256)
        rows: dict[tuple[int, int, int], np.ndarray] = {}
        for d, e in zip(found.index, found.encoded):
            p = lm(input_ids=torch.from_numpy(e.input_ids.astype(np.int64))[None]).logits[0].double().softmax(1).numpy()
            for t in range(len(e.input_ids) - 1):
                if e.loss_mask[t + 1]:
                    start = int(e.byte_end[t]) if e.turn[t] == e.turn[t + 1] else 0
                    rows[d, int(e.turn[t + 1]), start] = p[t]
        seen.append(rows)
        blocks = ((one.input_ids, one.turn, np.array([0, len(one.turn)])) for one in found.encoded)
        tables.append((table, turn_end_token(blocks, table)))
    (model, model_end), (source, source_end) = tables
    own_twin, source_twin = twins(model, model_end, source, source_end)
    shared = seen[0].keys() & seen[1].keys()
    sums = {"top1": 0.0, "topk": 0.0, "kl_bits": 0.0}
    for key in shared:
        merged = np.zeros(len(model))
        kept = own_twin >= 0
        np.add.at(merged, own_twin[kept], seen[0][key][kept])
        merged[~kept] = seen[0][key][~kept]
        own_top, source_top = np.argsort(-merged)[:5], np.argsort(-seen[1][key])[:5]
        values = measure_rows(
            own_top[None],
            own_twin,
            source_top[None],
            source_twin,
            seen[1][key][source_top][None],
            merged[np.maximum(source_twin[source_top], 0)][None],
        )
        for name in sums:
            sums[name] += float(values[name][0])
    table = agreement({"m": folders[0]}, {"s": folders[1]}, dialogues, top_k=5, samples=100)["sources"]["s"]
    assert table["shared_rows"]["m"] == len(shared)
    one = table["groups"]["overall"]["models"]["m"]
    for name, total in sums.items():
        assert one[name]["value"][0] == pytest.approx(total / len(shared), rel=1e-4), name


def test_the_commands_print_tables_and_write_json(tiny_world: Any, tmp_path: Path) -> None:
    models, data = [str(tiny_world.pivot), str(tiny_world.source)], ["--data", str(tiny_world.dialogues)]
    done = CliRunner().invoke(app, ["eval", "bpb", *models, *data, "--json", str(tmp_path / "bpb.json")])
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "bpb.json").read_text())
    assert table["groups"].keys() == {"overall", "a", "b"}
    assert "difference to pivot" in done.output
    source = ["--source", str(tiny_world.pivot), "--limit", "6", "--json", str(tmp_path / "agreement.json")]
    done = CliRunner().invoke(app, ["eval", "agreement", *models, *data, *source])
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "agreement.json").read_text())
    assert table["sources"]["pivot"]["groups"]["overall"]["models"]["pivot"]["top1"]["value"][0] == 1
    assert "agreement with pivot" in done.output


def test_models_of_the_same_last_name_are_told_apart_by_their_paths() -> None:
    """Catches two runs whose merged models cannot be compared, for both lie in a folder called merged."""
    assert model_names(["a/merged", "b/merged/", "b/sft"]) == {
        "a/merged": "a/merged", "b/merged": "b/merged/", "sft": "b/sft",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="named twice"):
        model_names(["a/merged", "a/merged/"])


def test_a_run_named_as_data_gives_the_dialogues_it_held_out(tiny_world: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    settings = {
        "pivot": str(tiny_world.pivot),
        "sources": [{"model": str(tiny_world.source)}],
        "data": {"train": str(tiny_world.dialogues), "held_out_fraction": 0.25},
        "out": str(run),
        "seed": 3,
    }
    (run / "config.yaml").write_text(json.dumps(settings))
    expected = split_held_out(load_dialogues(tiny_world.dialogues), 0.25, 3)[1]
    assert held_out(str(run), limit=None) == expected
    assert held_out(str(run), limit=2) == expected[:2]
    assert held_out(str(run), limit=None, format="auto", separator=None, max_bytes=None) == expected
    for command in (["bpb"], ["agreement", "--source", "x"]):
        for option, value in (("--format", "text"), ("--separator", "\n"), ("--max-bytes", "9")):
            done = CliRunner().invoke(app, ["eval", *command, "x", "--data", str(run), option, value])
            assert isinstance(done.exception, ConfigError)
            assert f"leave {option} out" in str(done.exception)
    assert held_out(str(tiny_world.dialogues), limit=3) == load_dialogues(tiny_world.dialogues)[:3]


def test_a_broken_model_and_too_many_candidates_are_named(tiny_world: Any, tmp_path: Path) -> None:
    dialogues = load_dialogues(tiny_world.dialogues)[:3]
    with pytest.raises(ConfigError, match="k is 400"):
        agreement({"m": tiny_world.pivot}, {"s": tiny_world.source}, dialogues, top_k=400)
    shutil.copytree(tiny_world.pivot, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    for model, source in ((tmp_path / "broken", tiny_world.pivot), (tiny_world.pivot, tmp_path / "broken")):
        with pytest.raises(DataError, match="broken gives NaN on held-out dialogue 0"):
            agreement({"m": model}, {"s": source}, dialogues, top_k=4)
