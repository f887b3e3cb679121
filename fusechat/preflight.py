"""What a run would be refused for, found before its first stage by the stages' own checks: no weights are loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusechat.artifact import MANIFEST, PARTIAL_SUFFIX, PROVENANCE, require_free_bytes, require_writable
from fusechat.checkpoint import open_checkpoint, resolve_model
from fusechat.config import ExtractConfig, RunConfig
from fusechat.errors import ConfigError, FusechatError
from fusechat.layout import Layout
from fusechat.records import Dialogue
from fusechat.split import Split


def preflight(config: RunConfig, layout: Layout, split: Split, targets: Sequence[str]) -> None:
    """Raise what a stage would raise of its settings, of a model or its template, or of what this machine lacks.

    Models are resolved, and downloaded where they are of the hub; of them configuration, tokenizer and headers are
    read. Servers are asked what they serve. What a finished stage needed is not asked for again: `targets` are the
    folders of what is trained.
    """
    import fusechat.merge  # noqa: F401  its compiled engine would be missed at the very end
    from fusechat.align.stage import chosen_rules
    from fusechat.evaluate.bpb import category_groups
    from fusechat.extract.settings import models_with_settings

    chosen_rules(**config.align.model_dump())
    category_groups(np.arange(len(split.held_out)), [dialogue.category for dialogue in split.held_out])
    require_writable(layout.out)
    require_writable(layout.stores or layout.out)
    chat = next((dialogue for dialogue in split.train if not dialogue.plain), None)
    for name, (model, options) in models_with_settings(config).items():
        _check_extraction(model, options, chat, finished=(layout.store(name) / MANIFEST).exists())
    pivot = resolve_model(config.pivot)
    if not all((layout.target(name) / PROVENANCE).exists() for name in targets):
        from fusechat.train.refusals import check_settings

        check_settings(config.train, pivot)
    _check_room(config, layout, pivot, targets)


def make_folders(layout: Layout) -> None:
    """Make the folders of a run; raises FusechatError where that cannot be."""
    for place in (layout.stores or layout.out, layout.out):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FusechatError(f"cannot make {place}: {error.strerror}; choose another place") from error


def _check_extraction(model: str, options: ExtractConfig, chat: Dialogue | None, *, finished: bool) -> None:
    from fusechat.extract import open_inputs
    from fusechat.extract.backend import engine_places
    from fusechat.spans import render_dialogue
    from fusechat.template import RenderError

    directory, facts, tokenizer, template = open_inputs(model, options)
    if options.backend != "vllm-server":
        open_checkpoint(directory)
    if chat is not None:
        with contextlib.suppress(RenderError):  # one dialogue may well be refused, but a template there must be
            render_dialogue(template, tokenizer, chat)
    if finished or options.ray is not None:
        return
    if options.backend != "vllm-server":
        _check_device("extract.device", options.device, "auto")
        if options.device_map is not None:
            _check_device("extract.device_map", options.device_map, *_PLACEMENTS)
        engine_places(options)
        return
    from fusechat.extract.server import check_servers
    from fusechat.extract.task import Task

    check_servers(
        Task(
            model=model,
            directory=directory,
            out=Path(),
            config=options,
            template=template,
            vocab_size=facts.vocab_size,
            max_length_tokens=facts.max_length_tokens,
            dtype=facts.dtype,
        )
    )


_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's


def _check_device(key: str, name: str, *words: str) -> None:
    """Raise ConfigError for a device that there is not; takes no memory of it."""
    import torch

    if name in words:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        known = ", ".join((*words, "cpu", "cuda"))
        raise ConfigError(f"{key}: {name} is none that torch knows: write {known} or cuda:N") from error
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(f"{key}: {name} is not here, torch sees {there} CUDA devices: leave it out, or use cpu")


def _check_room(config: RunConfig, layout: Layout, pivot: Path, targets: Sequence[str]) -> None:
    """Raise FusechatError when the disk cannot hold the models to be made and the weights in one checkpoint."""
    tensors = open_checkpoint(pivot).tensors.values()
    places = [*map(layout.target, targets), layout.merged]
    # What is unfinished holds some of it already.
    missing = [
        place for place in places if not any(p.exists() for p in (place, place.with_name(place.name + PARTIAL_SUFFIX)))
    ]
    needed_bytes = len(missing) * sum(tensor.size_bytes for tensor in tensors)
    if config.train.lora is None and set(missing) - {layout.merged}:
        needed_bytes += 4 * sum(tensor.n_elements for tensor in tensors)
    require_free_bytes(layout.out, needed_bytes)
