"""Chat templates: which one to use, and a dialogue as the text that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fusechat.artifact import sha256_bytes
from fusechat.checkpoint import resolve_model
from fusechat.errors import DataError, first_line
from fusechat.records import Message
from fusechat.tokenizer import load_tokenizer

OWN = "own"
PLAIN = "plain"

# The date that Meta's templates fall back to. A date of today would change the data set with the day of the run.
_DATE = "26 Jul 2024"
_FIXED_DATE_MACRO = "{% macro strftime_now(format) %}" + _DATE + "{% endmacro +%}"


class RenderError(Exception):
    """A template refuses a dialogue, or hides where its turns are; the dialogue is skipped with this reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A chat template and where it comes from; `jinja` is None when only running text can be rendered."""

    name: str
    jinja: str | None

    @property
    def sha256(self) -> str:
        """The SHA-256 of the template's text, of the word "plain" when there is none."""
        return sha256_bytes((PLAIN if self.jinja is None else self.jinja).encode())


def load_template(tokenizer: Any, spec: str = OWN) -> Template:
    """Return the template named by `spec`: "own", "plain", a .jinja file, or a tokenizer's folder or hub id.

    Another model's template writes this tokenizer's own BOS and EOS. A tokenizer without a template gets one for
    running text only. Raises DataError when the template is missing, no UTF-8 or not valid Jinja.
    """
    if spec == PLAIN:
        return Template(name=PLAIN, jinja=None)
    if spec == OWN:
        name = str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        return _checked(Template(name=name, jinja=_template_of(tokenizer)), tokenizer)
    if spec.endswith((".jinja", ".jinja2")):
        path = Path(spec)
        if not path.is_file():
            raise DataError(f"template {spec} does not exist: give a .jinja file, a tokenizer's folder, own or plain")
        try:
            return _checked(Template(name=spec, jinja=path.read_text(encoding="utf-8")), tokenizer)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"template {spec} cannot be read: {first_line(error)}") from error
    jinja = _template_of(load_tokenizer(resolve_model(spec, weights=False)))
    if jinja is None:
        raise DataError(f"the tokenizer of {spec} has no chat template: name one that has, or a .jinja file")
    return _checked(Template(name=spec, jinja=jinja), tokenizer)


def _template_of(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            f"the tokenizer has several chat templates and no default: name one's .jinja file ({error})"
        ) from error


def _checked(template: Template, tokenizer: Any) -> Template:
    """Return the template; raises DataError when it is not valid Jinja."""
    if template.jinja is None:
        return template
    try:
        _render(template, tokenizer, [Message(role="user", content="?")])
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"template {template.name} line {error.lineno} is not valid Jinja: {error.message}") from error
    except Exception:
        pass  # a template may well refuse this one dialogue (no system turn, say); each real one is asked in its turn
    return template


def _render(
    template: Template, tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    jinja = template.jinja
    assert jinja is not None
    # Another model's template may add a BOS to its strings, and Qwen2's tokenizer has none.
    missing = {name: "" for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None}
    text: str = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        tokenize=False,
        chat_template=_FIXED_DATE_MACRO + jinja if "strftime_now" in jinja else jinja,
        add_generation_prompt=add_generation_prompt,
        **missing,
    )
    return text


def render(
    template: Template, tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Return messages as the template writes them, with the tokenizer's own BOS and EOS.

    Raises RenderError with the template's reason, DataError when there is no template.
    """
    if template.jinja is None:
        raise DataError(
            f"{template.name} has no chat template, and the dialogues have turns: "
            "set `template` (in a run `extract.template`) to a .jinja file or to a tokenizer that has one"
        )
    try:
        return _render(template, tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise RenderError(f"the template refuses it: {first_line(error)}") from error
