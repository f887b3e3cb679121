"""Chat templates and spans: against rendering with and without each turn, for made and real templates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.demo.tokenizers import CHATML_TEMPLATE, LLAMA2_TEMPLATE, LLAMA3_TEMPLATE, byte_level_bpe
from fusechat.errors import DataError
from fusechat.records import Dialogue, Message
from fusechat.spans import Rendered, render_dialogue
from fusechat.template import RenderError, Template, load_template, render

OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] "
    "+ '<|end_of_turn|>' }}{% endfor %}"
)
RESPONSE = (
    "{% for m in messages %}{{ ('### Response:\n' if m['role'] == 'assistant' else '### Instruction:\n') "
    "+ m['content'] + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
# Takes the reasoning out of all but the last turn and writes it anew in the last, as Qwen3 does.
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] %}"
    "{% if loop.last %}{{ '<think>\n' + m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') "
    "+ '\n</think>\n\n' }}{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MADE = {
    "chatml": CHATML_TEMPLATE,
    "llama2": LLAMA2_TEMPLATE,
    "llama3": LLAMA3_TEMPLATE,
    "openchat": OPENCHAT,
    "response": RESPONSE,
    "gemma": GEMMA,
    "reasoning": REASONING,
}


@functools.cache
def tokenizer() -> Any:
    return byte_level_bpe(["Hello world, how are you?"], 300)


def template(name: str) -> Template:
    return Template(name=name, jinja=MADE[name])


def chat(*contents: str, system: str | None = None) -> Dialogue:
    head = [] if system is None else [Message(role="system", content=system)]
    turns = [Message(role="assistant" if i % 2 else "user", content=c) for i, c in enumerate(contents)]
    return Dialogue(messages=(*head, *turns))


def check(rendered: Rendered, dialogue: Dialogue) -> None:
    """Spans are in order, apart, and hold the part of the content that they say."""
    answers = [m.content for m in dialogue.messages if m.role == "assistant"]
    assert len(rendered.spans) == len(answers)
    position = 0
    for span, content in zip(rendered.spans, answers):
        part = rendered.text[span.start : span.end]
        assert content[span.offset : span.offset + len(part)] == part
        assert part.strip() == content.strip()
        assert position <= span.start <= span.end <= span.turn_end <= len(rendered.text)
        position = span.turn_end


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([name for name in MADE if name != "reasoning"]),
    st.lists(st.text(alphabet="aA :\n你é😀<|im_end|>\ue000", min_size=1, max_size=12), min_size=2, max_size=6),
)
def test_spans_hold_the_contents(name: str, contents: list[str]) -> None:
    """Catches contents found elsewhere in the text, wrong offsets after trimming, and turns out of order.

    The reference renders the dialogue with and without each turn: the content follows the prompt.
    """
    dialogue = chat(*(c if c.strip() else "x" for c in contents[: len(contents) // 2 * 2]))
    rendered = render_dialogue(template(name), tokenizer(), dialogue)
    check(rendered, dialogue)
    headers = {"openchat": "GPT4 Correct Assistant: ", "gemma": "<start_of_turn>assistant\n", "llama2": " "}
    turns = [i for i, m in enumerate(dialogue.messages) if m.role == "assistant"]
    for span, i in zip(rendered.spans, turns):
        prompt = render(template(name), tokenizer(), dialogue.messages[:i], add_generation_prompt=True)
        assert span.start == len(prompt + headers.get(name, ""))
        assert rendered.text[: span.turn_end] == render(template(name), tokenizer(), dialogue.messages[: i + 1])


def test_a_content_that_repeats_the_prompt_is_not_mistaken() -> None:
    """Catches a search for the content's text: it stands in the user's turn and in the header as well."""
    rendered = render_dialogue(template("chatml"), tokenizer(), chat("assistant", "assistant", "user", "user"))
    for span, before in zip(rendered.spans, ["<|im_start|>assistant\n"] * 2):
        assert rendered.text[: span.start].endswith(before)
    assert rendered.text[rendered.spans[1].end :] == "<|im_end|>\n"


def test_turn_end_stops_before_the_next_turn_when_no_special_token_ends_it() -> None:
    """Catches "### Instruction:" of the next turn taught as the assistant's words."""
    rendered = render_dialogue(template("response"), tokenizer(), chat("q", "one", "q", "two"))
    assert [rendered.text[s.end : s.turn_end] for s in rendered.spans] == ["\n\n", "\n\n"]


def test_trimmed_offset_counts_in_the_original_content() -> None:
    """Catches spans counted from the trimmed text."""
    rendered = render_dialogue(template("llama3"), tokenizer(), chat("q", " \n é x \n"))
    assert rendered.text[rendered.spans[0].start : rendered.spans[0].end] == "é x"
    assert rendered.spans[0].offset == 3


def test_reasoning_templates_that_look_into_the_content() -> None:
    """Catches spans that hold the reasoning a template left out, or miss the one it kept."""
    thinking = "<think>\nhm\n</think>\n\nanswer"
    rendered = render_dialogue(template("reasoning"), tokenizer(), chat("q", thinking, "q", thinking))
    parts = [rendered.text[s.start : s.end] for s in rendered.spans]
    assert parts == ["answer", thinking]
    assert [s.offset for s in rendered.spans] == [thinking.index("answer"), 0]
    assert [rendered.text[s.end : s.turn_end] for s in rendered.spans] == ["<|im_end|>\n"] * 2


def test_an_answer_may_be_part_of_what_ends_its_turn() -> None:
    """Catches an end of turn cut off behind the "e" of <|im_end|>, where a template must be read by prefixes."""
    always = REASONING.replace("{% else %}", "{% else %}{{ '<think>\n\n</think>\n\n' if m['role'][0] == 'a' }}")
    thinking = "<think>\nhm\n</think>\n\n"
    made = render_dialogue(
        Template(name="x", jinja=always), tokenizer(), chat("q", thinking + "e", "q", thinking + ">")
    )
    assert [made.text[s.start : s.end] for s in made.spans] == ["e", thinking + ">"]
    assert [made.text[s.end : s.turn_end] for s in made.spans] == ["<|im_end|>\n"] * 2


@pytest.mark.parametrize(
    ("name", "dialogue", "reason"),
    [
        ("gemma", chat("q", "a", system="S"), "System role not supported"),
        ("gemma", Dialogue(messages=tuple(Message(role="user", content="q") for _ in "ab")), "must alternate"),
        ("upper", chat("q", "a"), "changes the content of an assistant turn"),
        ("twice", chat("q", "a"), "each assistant turn once and in order"),
        ("never", chat("q", "a"), "each assistant turn once and in order"),
        ("undefined", chat("q", "a"), "'tool' is undefined"),
    ],
)
def test_a_refused_dialogue_says_why(name: str, dialogue: Dialogue, reason: str) -> None:
    """Catches a span guessed in a text that is not the content, and a refusal without its reason."""
    extra = {
        "upper": "{% for m in messages %}{{ m.content.upper() + m.content|length|string }}{% endfor %}",
        "twice": "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
        "never": "hello",
        "undefined": "{{ tool.first }}",
    }
    with pytest.raises(RenderError, match=reason):
        render_dialogue(Template(name=name, jinja=MADE.get(name) or extra[name]), tokenizer(), dialogue)


def test_broken_and_missing_templates_are_errors_with_the_mend(tmp_path: Path) -> None:
    """Catches a syntax error taken for a refusal of every dialogue."""
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(DataError, match=r"broken\.jinja line 2 is not valid Jinja"):
        load_template(tokenizer(), str(broken))
    with pytest.raises(DataError, match="does not exist"):
        load_template(tokenizer(), str(tmp_path / "none.jinja"))
    broken.write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(DataError, match=r"broken\.jinja cannot be read: 'utf-8' codec"):
        load_template(tokenizer(), str(broken))
    with pytest.raises(DataError, match="no tokenizer that loads"):
        load_template(tokenizer(), str(tmp_path))
    with pytest.raises(DataError, match="plain has no chat template, and the dialogues have turns: set `template`"):
        render_dialogue(load_template(tokenizer(), "plain"), tokenizer(), chat("q", "a"))


def test_a_library_that_says_nothing_is_named_by_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an IndexError in the place of the one line: the tokenizers package raises what it likes."""

    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(DataError, match="no tokenizer that loads: NotImplementedError"):
        load_template(tokenizer(), str(tmp_path))


def test_templates_come_from_the_tokenizer_a_file_or_another_tokenizer(tmp_path: Path) -> None:
    """Catches a template taken from the wrong place, or with the other tokenizer's special tokens."""
    own = load_template(tokenizer())
    assert own.jinja == CHATML_TEMPLATE
    tokenizer().save_pretrained(tmp_path / "other")
    assert load_template(tokenizer(), str(tmp_path / "other")).sha256 == own.sha256
    (tmp_path / "x.jinja").write_text("{{ eos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    other = load_template(tokenizer(), str(tmp_path / "x.jinja"))
    assert render(other, tokenizer(), chat("q").messages) == "<|im_end|>q"
    assert len({own.sha256, other.sha256, load_template(tokenizer(), "plain").sha256}) == 3


def test_a_template_of_the_hub_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes fetched for a template."""
    tokenizer().save_pretrained(tmp_path / "other")
    asked: list[str] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path / "other")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_template(tokenizer(), "owner/name").sha256 == load_template(tokenizer()).sha256
    assert "*.json" in asked
    assert not any("safetensors" in pattern for pattern in asked)


def test_the_date_does_not_change_the_text() -> None:
    """Catches a data set that differs from one day to the next."""
    jinja = "\n{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = render(Template(name="dated", jinja=jinja), tokenizer(), chat("q", "a").messages)
    assert text == "\n26 Jul 2024qa"


def test_running_text_needs_no_template() -> None:
    """Catches running text put through a chat template."""
    plain = Dialogue(messages=(Message(role="assistant", content="Once.\n"),), plain=True)
    for which in (template("chatml"), Template(name="plain", jinja=None)):
        rendered = render_dialogue(which, tokenizer(), plain)
        assert rendered.text == "Once.\n"
        assert (rendered.spans[0].start, rendered.spans[0].end) == (0, 6)


def test_real_templates(shared_data: Path) -> None:
    """Catches constructs that only published templates have: three dialogues through every template there is."""
    dialogues = [
        chat("Hi", "Hello! ", "And you? 你好", " fine 😀\n", "assistant", "user"),
        chat("Hi", "Hi", "Hi", "Hi"),
        chat("q", "<think>\nx\n</think>\n\ny", "q", "<think>\nx\n</think>\n\ny"),
    ]
    rendered = 0
    for path in sorted((shared_data / "tokenizers" / "_templates").glob("*.jinja")):
        which = load_template(tokenizer(), str(path))
        for dialogue in dialogues:
            try:
                result = render_dialogue(which, tokenizer(), dialogue)
            except RenderError:
                continue
            rendered += 1
            for span, message in zip(result.spans, [m for m in dialogue.messages if m.role == "assistant"]):
                part = result.text[span.start : span.end]
                assert message.content[span.offset :].startswith(part)
                assert part.strip().endswith(message.content.strip()[-1])
    assert rendered >= 42
