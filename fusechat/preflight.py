"""What a run would be refused for, found before its first stage by the stages' own checks: no weights are loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from fusechat.artifact import MANIFEST
from fusechat.checkpoint import open_checkpoint
from fusechat.config import ExtractConfig, RunConfig
from fusechat.layout import Layout
from fusechat.records import Dialogue
from fusechat.split import Split


def preflight(config: RunConfig, layout: Layout, split: Split, targets: Sequence[str]) -> None:
    """Raise what a stage would raise of its settings, of a model or its template, or of what this machine lacks.

    Models are resolved, and downloaded where they are of the hub; of them configuration, tokenizer and headers are
    read. What a finished stage needed is not asked for again: `targets` are the folders of what is trained.
    """
    import fusechat.merge  # noqa: F401  its compiled engine would be missed at the very end
    from fusechat.align.stage import chosen_rules
    from fusechat.evaluate.bpb import category_groups
    from fusechat.extract.settings import models_with_settings
    from fusechat.train import PROVENANCE

    chosen_rules(**config.align.model_dump())
    category_groups(np.arange(len(split.held_out)), [dialogue.category for dialogue in split.held_out])
    if not all((layout.target(name) / PROVENANCE).exists() for name in targets):
        from fusechat.train.fit import check_settings

        check_settings(config.train)
    chat = next((dialogue for dialogue in split.train if not dialogue.plain), None)
    for name, (model, options) in models_with_settings(config).items():
        _check_extraction(model, options, chat, finished=(layout.store(name) / MANIFEST).exists())


def _check_extraction(model: str, options: ExtractConfig, chat: Dialogue | None, *, finished: bool) -> None:
    from fusechat.extract import open_inputs
    from fusechat.extract.backend import engine_places
    from fusechat.spans import render_dialogue
    from fusechat.template import RenderError

    directory, _, tokenizer, template = open_inputs(model, options)
    if options.backend != "vllm-server":
        open_checkpoint(directory)
    if chat is not None:
        with contextlib.suppress(RenderError):  # one dialogue may well be refused, but a template there must be
            render_dialogue(template, tokenizer, chat)
    if not finished and options.backend != "vllm-server" and options.ray is None:
        engine_places(options)
