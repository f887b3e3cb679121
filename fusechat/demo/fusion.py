"""The demo: builds its world, writes an ordinary YAML, runs what `fusechat run` runs, and checks what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.artifact import Json, atomic_write
from fusechat.config import load_config
from fusechat.demo.world import World, build_world
from fusechat.dialogue import load_dialogues
from fusechat.layout import Layout
from fusechat.model import load_model
from fusechat.records import Dialogue
from fusechat.reporter import Reporter
from fusechat.run import run
from fusechat.tokenizer import load_tokenizer
from fusechat.yaml_file import yaml_text

# Chosen on a world of seed 101, before the present world of the default seed was made, and stated in the YAML.
SETTINGS: Json = {
    "extract": {"top_k": 10, "max_length_tokens": 256, "dtype": "float32"},
    "align": {"vocab": "prefix", "granularity": "cells", "unaligned": "gold"},
    "train": {
        "hard_weight": 0.5,
        "missing": "tail",
        "learning_rate": 3e-3,
        "epochs": 12,
        "batch_size": 16,
        "micro_batch_size": 16,
        "save_steps": 100,
    },
    "merge": {"method": "sce", "variant": "fuseai", "select_topk": 1.0},
}
VLLM_HEAD_SIZE = 32  # the smallest its CPU attention takes
REASONS = """\
# fusechat demo: an ordinary configuration; `fusechat run` reads it.
# Chosen openly for this scale, none of it by the held-out set:
#   train.hard_weight 0.5   the paper's 0.9 suits light tuning of a strong pivot; here the sources know far more than
#                           the pivot, so half of the loss is theirs
#   train.epochs 12         the paper trains 3 epochs on 95,000 dialogues; these are 200. The rate is that of a model of
#   learning_rate 3e-3      half a million parameters. Both were chosen on a world of another seed (101)
#   merge.select_topk 1.0   the paper's 0.1 merges from a tenth of the elements; fine-tuning moves this small pivot far,
#   merge.variant fuseai    and the reading of SCE that released FuseChat-7B keeps every update anyway
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that an honest fusion must show, and whether it does."""

    claim: str
    value: float
    low: float
    high: float
    holds: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the demo found: the table, the checks, one prompt, and each model's answer to it."""

    results: Json
    checks: list[Check]
    prompt: str
    answers: dict[str, str]


def fuse_demo(out: Path, *, seed: int = 0, backend: str = "hf", reporter: Reporter | None = None) -> Outcome:
    """Run the demo under `out`; a second run there finds the models trained and the stages done.

    It computes in one thread: matrices this small gain nothing from more, and the result is then every machine's.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fuse(out, seed, backend, reporter or Reporter())
    finally:
        torch.set_num_threads(threads)


def _fuse(out: Path, seed: int, backend: str, report: Reporter) -> Outcome:
    advance = report.stage("build models", "steps")
    head_size = VLLM_HEAD_SIZE if backend == "vllm" else None
    world = build_world(out / "world", seed=seed, head_size=head_size, progress=advance)
    report.done("build models", f"pivot and {len(world.sources)} sources in {out / 'world'}")
    config = write_config(world, out, seed, backend)
    results = run(config, reporter=report)
    prompt, answers = _answers(world, out)
    return Outcome(results=results, checks=checks(results, world), prompt=prompt, answers=answers)


def write_config(world: World, out: Path, seed: int, backend: str = "hf") -> Path:
    """Write the demo's YAML and return its path."""
    values = {
        "pivot": str(world.pivot.resolve()),
        "sources": [{"name": name, "model": str(path.resolve())} for name, path in world.sources.items()],
        "data": {"train": str(world.train.resolve()), "held_out": str(world.held_out.resolve())},
        "out": str((out / "run").resolve()),
        "seed": seed,
        **SETTINGS,
        "extract": SETTINGS["extract"] | {"backend": backend},
    }
    path = out / "demo.yaml"
    with atomic_write(path) as partial:
        partial.write_text(REASONS + yaml_text(values), encoding="utf-8")
    load_config(path)
    return path


def checks(results: Json, world: World) -> list[Check]:
    """Return what must hold: each target beats SFT on its source's topics, the merged model beats it overall."""

    def check(claim: str, group: str, model: str) -> Check:
        value, low, high = results["groups"][group]["models"][model]["difference_to_sft"]
        return Check(claim=claim, value=value, low=low, high=high, holds=high < 0)

    found = [
        check(f"target {name} beats SFT on {topic}", topic, f"target {name}")
        for name, topics in world.topics.items()
        for topic in topics
    ]
    return [*found, check("the merged model beats SFT overall", "overall", "merged")]


def _answers(world: World, out: Path) -> tuple[str, dict[str, str]]:
    dialogue = load_dialogues(world.held_out)[0]
    layout = Layout(out=out / "run")
    models = {"pivot": world.pivot, "SFT": layout.target("sft"), "merged": layout.merged}
    first = next(i for i, message in enumerate(dialogue.messages) if message.role == "assistant")
    answers = {name: answer(path, dialogue, first) for name, path in models.items()}
    return dialogue.messages[first - 1].content, answers


def answer(directory: Path, dialogue: Dialogue, turn: int, *, max_new_tokens: int = 80) -> str:
    """Generate a model's greedy answer in place of message `turn`."""
    import torch

    tokenizer: Any = load_tokenizer(directory)
    model = load_model(directory, device="cpu")
    messages = [{"role": m.role, "content": m.content} for m in dialogue.messages[:turn]]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
