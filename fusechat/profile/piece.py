"""A bounded piece of a stage: what `fusechat run` calls, on a few dialogues, in a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.artifact import MANIFEST, read_json
from fusechat.checkpoint import TensorEntry, open_checkpoint, resolve_model
from fusechat.config import RunConfig, source_name
from fusechat.dialogue import load_dialogues
from fusechat.errors import ConfigError
from fusechat.layout import Layout
from fusechat.records import Dialogue
from fusechat.run import merge_recipe, target_names, target_settings
from fusechat.split import read_options

STAGES = ("extract", "align", "train", "merge")
MERGED_ELEMENTS = 32_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is profiled: `run(out)` does it once into a new place; `reads` are the files it must read."""

    run: Callable[[Path], Any]
    reads: tuple[Path, ...] = ()
    amount: int = 0
    unit: str = ""
    """What `amount` counts: tokens of the pivot, or elements of the merged model."""

    in_this_process: bool = True
    """Whether a first call leaves a later one its imports and memory; one that starts engines leaves nothing."""


def prepare(stage: str, config: RunConfig, folder: Path, dialogues: int) -> Piece:
    """Do what a stage needs first, under `folder`, imports included, and return what is to be profiled.

    The pivot and the first source stand for all. Training is two steps; merging is of the pivot's first tensors, with
    targets of an earlier run where there are some, else with copies of the pivot. Raises ConfigError for another stage.
    """
    layout = Layout(out=folder)
    if stage == "merge":
        return _merge(config, layout)
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r} to profile: there are {', '.join(STAGES)} and kernels")
    from fusechat.align import align
    from fusechat.extract import extract
    from fusechat.extract.settings import extract_settings
    from fusechat.train import train

    chosen = load_dialogues(config.data.train, limit=dialogues, **read_options(config.data))
    source = config.sources[0]
    name = source_name(source)
    stores = layout.store("pivot"), layout.store(name)

    def extract_model(which: str, model: str, out: Path) -> Any:
        return extract(model, chosen, out, extract_settings(config, source if which == name else None))

    if stage == "extract":
        if config.extract.backend == "hf":
            return _scoring(config, chosen)
        return Piece(run=lambda out: extract_model("pivot", config.pivot, out), in_this_process=False)
    extract_model("pivot", config.pivot, stores[0])
    extract_model(name, source.model, stores[1])
    if stage == "align":
        tokens = sum(shard["n_tokens"] for shard in read_json(stores[0] / MANIFEST)["shards"])
        return Piece(
            run=lambda out: align(*stores, out, **config.align.model_dump()), reads=stores, amount=tokens, unit="tokens"
        )
    align(*stores, layout.aligned(name), **config.align.model_dump())
    settings = target_settings(config, [name]).model_copy(update={"max_steps": 2, "final": "last"})
    return Piece(run=lambda out: train(config.pivot, stores[0], layout.aligned(name), out, settings))


def _scoring(config: RunConfig, chosen: Sequence[Dialogue]) -> Piece:
    """Score the pivot's rows in this process: a profiler does not see into the child that gives its GPU back."""
    from fusechat.bytetable import ByteTable
    from fusechat.encode import encode_all
    from fusechat.extract.facts import model_facts
    from fusechat.extract.hf import score_function
    from fusechat.extract.settings import extract_settings
    from fusechat.model import load_model
    from fusechat.template import load_template
    from fusechat.tokenizer import load_tokenizer

    options = extract_settings(config)
    directory = resolve_model(config.pivot)
    facts = model_facts(directory, options)
    tokenizer = load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
    found = encode_all(
        chosen,
        tokenizer,
        ByteTable.from_tokenizer(tokenizer, facts.vocab_size),
        template=load_template(tokenizer, options.template),
        max_length_tokens=facts.max_length_tokens,
    )
    model = load_model(
        directory,
        dtype=facts.dtype,
        device=options.device,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
    )
    score = score_function(model, options, config.seed)
    return Piece(run=lambda _: score(found.encoded, found.index, lambda _: None))


def _merge(config: RunConfig, layout: Layout) -> Piece:
    from fusechat.merge import merge

    earlier = Layout(out=Path(config.out))
    names = target_names(config)
    pivot = resolve_model(config.pivot)
    kept: list[str] = []
    elements = 0
    for tensor in open_checkpoint(pivot).tensors.values():
        if elements and elements + tensor.n_elements > MERGED_ELEMENTS:
            continue
        kept.append(tensor.name)
        elements += tensor.n_elements
    parts = [layout.out / "pivot", *(layout.target(name) for name in names)]
    _write_part(pivot, kept, parts[0])
    for name, part in zip(names, parts[1:]):
        target = earlier.target(name)
        _write_part(target if (target / "config.json").exists() else pivot, kept, part)
    recipe = merge_recipe(config.model_copy(update={"pivot": str(parts[0])}), layout, names)
    return Piece(run=lambda out: merge(recipe, out), reads=tuple(parts), amount=elements, unit="elements")


def size_bytes(folder: Path) -> int:
    """Return the bytes of all files of an artefact."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_part(model: Path, names: list[str], out: Path) -> None:
    """Write a model of some of another's tensors."""
    tensors = open_checkpoint(model).tensors
    out.mkdir(parents=True)
    shutil.copyfile(model / "config.json", out / "config.json")
    header: dict[str, Any] = {}
    end = 0
    entries: list[TensorEntry] = [tensors[name] for name in names]
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.size_bytes],
        }  # fmt: skip
        end += entry.size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (out / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            with entry.file.open("rb") as source:
                source.seek(entry.begin)
                file.write(source.read(entry.size_bytes))
