"""Prompts in a model's tokens, and its tokens as an answer's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusechat.bytetable import ByteTable, Role
from fusechat.errors import DataError
from fusechat.evaluate.answers import Request
from fusechat.records import Message
from fusechat.template import RenderError, Template, render


def prompt_ids(template: Template, tokenizer: Any, request: Request) -> list[int]:
    """Return a request rendered up to where the assistant begins; raises DataError when there is no template."""
    if template.jinja is None:
        raise DataError(
            f"{template.name} has no chat template, and a benchmark of dialogues needs one: "
            "give --template a .jinja file or a model that has one"
        )
    messages = [Message(role=m["role"], content=m["content"]) for m in request.messages]
    try:
        text = render(template, tokenizer, messages, add_generation_prompt=True)
    except RenderError as error:
        raise DataError(f"template {template.name} cannot write the benchmark's dialogues: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def end_tokens(tokenizer: Any, table: ByteTable, declared: int | Sequence[int] | None) -> list[int]:
    """Return every token that ends an answer: what the model declares, and the vocabulary's ends of turns and texts."""
    ids = set() if declared is None else {declared} if isinstance(declared, int) else set(declared)
    ids |= {i for i, role in enumerate(table.roles.tolist()) if role in (Role.EOS, Role.TURN)}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return tokens as text, without special tokens and the white space around it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()
