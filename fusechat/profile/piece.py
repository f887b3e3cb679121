"""A bounded piece of a stage: what `fusechat run` calls, on a few dialogues, in a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusechat.checkpoint import TensorEntry, open_checkpoint, resolve_model
from fusechat.config import RunConfig, source_name
from fusechat.dialogue import read_dialogues
from fusechat.errors import ConfigError
from fusechat.layout import Layout
from fusechat.run import merge_recipe

STAGES = ("extract", "align", "train", "merge")
MERGED_ELEMENTS = 32_000_000


def prepare(stage: str, config: RunConfig, folder: Path, dialogues: int) -> Callable[[], Any]:
    """Do what a stage needs first, under `folder`, and return the call that is to be profiled.

    The pivot and the first source stand for all. Training is two steps; merging is of the pivot's first tensors, with
    targets of an earlier run where there are some, else with copies of the pivot. Raises ConfigError for another stage.
    """
    layout = Layout(out=folder)
    if stage == "merge":
        return _merge(config, layout)
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r} to profile: there are {', '.join(STAGES)} and kernels")
    options = {"format": config.data.format, "separator": config.data.separator, "max_bytes": config.data.max_bytes}
    chosen, _ = read_dialogues(config.data.train, limit=dialogues, **options)  # type: ignore[arg-type]
    source = config.sources[0]
    name = source_name(source)

    def extract(which: str, model: str) -> Any:
        from fusechat.extract import extract as run

        own = (source.extract if which == name else None) or config.extract
        template = config.pivot if own.template == "pivot" else own.template
        return run(model, chosen, layout.store(which), own.model_copy(update={"template": template}))

    def align() -> Any:
        from fusechat.align import align as run

        return run(layout.store("pivot"), layout.store(name), layout.aligned(name), **config.align.model_dump())

    def train() -> Any:
        from fusechat.train import train as run

        settings = config.train.model_copy(update={"max_steps": 2})
        return run(config.pivot, layout.store("pivot"), layout.aligned(name), layout.target(name), settings)

    if stage == "extract":
        return lambda: extract("pivot", config.pivot)
    extract("pivot", config.pivot)
    extract(name, source.model)
    if stage == "align":
        return align
    align()
    return train


def _merge(config: RunConfig, layout: Layout) -> Callable[[], Any]:
    earlier = Layout(out=Path(config.out))
    names = [source_name(source) for source in config.sources]
    pivot = resolve_model(config.pivot)
    kept: list[str] = []
    elements = 0
    for tensor in open_checkpoint(pivot).tensors.values():
        if elements and elements + tensor.n_elements > MERGED_ELEMENTS:
            continue
        kept.append(tensor.name)
        elements += tensor.n_elements
    _write_part(pivot, kept, layout.out / "pivot")
    for name in names:
        target = earlier.target(name)
        _write_part(target if (target / "config.json").exists() else pivot, kept, layout.target(name))
    recipe = merge_recipe(config.model_copy(update={"pivot": str(layout.out / "pivot")}), layout, names)

    def merge() -> Any:
        from fusechat.merge import merge as run

        return run(recipe, layout.merged)

    return merge


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
