"""The demo's world on disk: a pivot, three sources that are each an expert, and dialogues to fuse and to test on."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusechat.artifact import PARTIAL_SUFFIX, Json, atomic_write, read_json, sha256_file, sha256_json, write_json
from fusechat.demo import grammar, models, tokenizers
from fusechat.demo.grammar import TOPICS, ZIPF_EXPONENT, Facts, dialogues
from fusechat.demo.models import build_model, save_model, train_model
from fusechat.demo.tokenizers import KINDS
from fusechat.errors import MismatchError
from fusechat.records import Dialogue

Progress = Callable[[int, int], None]

TRAIN_DIALOGUES = 200
HELD_OUT_DIALOGUES = 800
TOKENIZER_DIALOGUES = 1000
BATCH_DIALOGUES = 16
NOTE = "demo.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """How one model of the world is made; the topics it is an expert of come `expertise` times as often as others."""

    name: str
    architecture: str
    tokenizer: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    topics: tuple[str, ...]
    train_dialogues: int
    learning_rate: float
    expertise: float = 1.0
    zipf_exponent: float = ZIPF_EXPONENT


PIVOT = ModelSpec(
    name="pivot",
    architecture="llama",
    tokenizer="byte_level_with_headers",
    vocab_size=768,
    hidden=96,
    layers=3,
    heads=4,
    topics=(),
    train_dialogues=4000,
    learning_rate=3e-3,
    zipf_exponent=0.0,
)
SOURCES = (
    ModelSpec(
        name="llama-cooking",
        architecture="llama",
        tokenizer="sentencepiece_bpe",
        vocab_size=800,
        hidden=144,
        layers=3,
        heads=4,
        topics=("cooking",),
        train_dialogues=6000,
        learning_rate=3e-3,
        expertise=2.5,
    ),
    ModelSpec(
        name="qwen2-travel",
        architecture="qwen2",
        tokenizer="byte_level_bpe",
        vocab_size=900,
        hidden=128,
        layers=3,
        heads=4,
        topics=("travel",),
        train_dialogues=6000,
        learning_rate=3e-3,
        expertise=2.5,
    ),
    ModelSpec(
        name="neox-numbers",
        architecture="gpt_neox",
        tokenizer="unigram",
        vocab_size=760,
        hidden=112,
        layers=3,
        heads=4,
        topics=("sums", "lists"),
        train_dialogues=6000,
        learning_rate=3e-3,
        expertise=2.5,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where everything is: model directories, data files, and the topics each source is the expert of."""

    pivot: Path
    sources: dict[str, Path]
    train: Path
    held_out: Path
    topics: dict[str, tuple[str, ...]]


def build_world(out: Path, *, seed: int, head_size: int | None = None, progress: Progress | None = None) -> World:
    """Make the world of a seed under `out`, or take from there what an earlier call has made of the same seed.

    With `head_size` the models are widened to attention heads of that size: vLLM's kernels do not take every size.
    `progress(done_steps, all_steps)` is told of every training step. Raises MismatchError when a folder to be written
    holds something that is not the demo's.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = Facts(seed)
    even = dict.fromkeys(TOPICS, 1.0)
    train = dialogues(facts, even, TRAIN_DIALOGUES, "train")
    seen = set(train)
    # Short dialogues come up twice: none that is trained on is held out.
    fresh = [d for d in dialogues(facts, even, 2 * HELD_OUT_DIALOGUES, "held_out") if d not in seen]
    paths = {"train": out / "train.jsonl", "held_out": out / "held_out.jsonl"}
    _write_dialogues(paths["train"], train)
    _write_dialogues(paths["held_out"], fresh[:HELD_OUT_DIALOGUES])
    texts = [m.content for d in dialogues(facts, even, TOKENIZER_DIALOGUES, "tokenizers") for m in d.messages]
    # The largest first, so that no process is left alone with one at the end.
    specs = [spec if head_size is None else _widened(spec, head_size) for spec in (*SOURCES, PIVOT)]
    _make_all(out, specs, seed, texts, progress or (lambda done, total: None))
    return World(
        pivot=out / PIVOT.name,
        sources={spec.name: out / spec.name for spec in SOURCES},
        train=paths["train"],
        held_out=paths["held_out"],
        topics={spec.name: spec.topics for spec in SOURCES},
    )


def _widened(spec: ModelSpec, head_size: int) -> ModelSpec:
    heads = -(-spec.hidden // head_size)
    return replace(spec, heads=heads, hidden=heads * head_size)


def _key(spec: ModelSpec, seed: int) -> str:
    """Return the hash of everything that decides a model: its specification, the seed, our code, the libraries."""
    import tokenizers as tokenizers_library
    import torch
    import transformers

    code = {
        Path(str(module.__file__)).name: sha256_file(Path(str(module.__file__)))
        for module in (grammar, models, tokenizers)
    }
    versions = {library.__name__: library.__version__ for library in (torch, transformers, tokenizers_library)}
    return sha256_json(
        {"spec": asdict(spec), "seed": seed, "code": code, "versions": versions, "batch": BATCH_DIALOGUES}
    )


def _is_made(directory: Path, key: str) -> bool:
    """Return whether the model was made from the same things and its weights are whole."""
    if not (directory / NOTE).exists():
        if directory.exists():
            raise MismatchError(f"{directory} exists and is not a model of the demo: choose another --out")
        return False
    note: Json = read_json(directory / NOTE)
    weights = directory / "model.safetensors"
    return bool(note["key"] == key and weights.exists() and sha256_file(weights) == note["sha256"])


def _make_all(out: Path, specs: Sequence[ModelSpec], seed: int, texts: list[str], progress: Progress) -> None:
    """Make the models that are not there yet, one process and one thread each.

    Matrices this small gain little from threads, and with one thread the weights do not depend on how many there are.
    """
    missing = [spec for spec in specs if not _is_made(out / spec.name, _key(spec, seed))]
    all_steps = {spec.name: -(-spec.train_dialogues // BATCH_DIALOGUES) for spec in specs}
    done_before = sum(all_steps.values()) - sum(all_steps[spec.name] for spec in missing)
    if not missing:
        progress(done_before, done_before)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    workers = min(len(missing), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,)) as pool:
        pending = {pool.submit(_make, out / spec.name, spec, seed, texts) for spec in missing}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            progress(done_before + counter.value, sum(all_steps.values()))
            for future in finished:
                future.result()


_steps: Any = None


def _start_worker(counter: Any) -> None:
    import torch

    global _steps  # noqa: PLW0603  (a worker's one way to be handed shared memory)
    _steps = counter
    torch.set_num_threads(1)


def _count_step() -> None:
    with _steps.get_lock():
        _steps.value += 1


def _make(directory: Path, spec: ModelSpec, seed: int, texts: list[str]) -> None:
    """Train one model and its tokenizer and put them in place, whole."""
    tokenizer = KINDS[spec.tokenizer](texts, spec.vocab_size)
    model: Any = build_model(
        spec.architecture, tokenizer, hidden=spec.hidden, layers=spec.layers, heads=spec.heads, seed=seed
    )
    weights = {topic: spec.expertise if topic in spec.topics else 1.0 for topic in TOPICS}
    loss = train_model(
        model,
        tokenizer,
        dialogues(Facts(seed, spec.zipf_exponent), weights, spec.train_dialogues, spec.name),
        learning_rate=spec.learning_rate,
        batch_dialogues=BATCH_DIALOGUES,
        seed=seed,
        on_step=_count_step,
    )
    partial = directory.with_name(directory.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, tokenizer, partial)
    note = {"key": _key(spec, seed), "sha256": sha256_file(partial / "model.safetensors"), "loss": loss}
    write_json(partial / NOTE, {**note, "spec": asdict(spec)})
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _write_dialogues(path: Path, content: list[Dialogue]) -> None:
    """Write dialogues as JSON lines of OpenAI messages with their category."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        for dialogue in content:
            messages = [{"role": m.role, "content": m.content} for m in dialogue.messages]
            file.write(json.dumps({"messages": messages, "category": dialogue.category}, ensure_ascii=False) + "\n")
