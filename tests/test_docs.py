"""What README and docs tell users to type: every command parses, and runs on small models unless it says why not.

A block of shell that cannot run here has a comment before it: <!-- not run: REASON -->. Its commands are still parsed,
so that an option that was renamed turns this file red.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from conftest import TinyWorld
from pydantic import BaseModel

from fusechat import config
from fusechat.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<kind>sh|yaml)(?P<rest>[^\n]*)\n(?P<body>.*?)^```", re.M | re.S
)
# Hub ids of the examples: folders of these names stand where the commands run.
NAMES = {
    "pivot": ["models/pivot", "openchat/openchat_3.5"],
    "source": ["models/source-a", "models/source-b", "Qwen/Qwen2-7B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3"],
}
PREAMBLE = """set -euo pipefail
fusechat() { "$PYTHON" -m fusechat "$@"; }
make() { for target in "$@"; do grep -q "^$target:" "$ROOT/Makefile"; done; }
pip() { :; }
python() { case "$1" in docs/*) local script="$ROOT/$1"; shift; "$PYTHON" "$script" "$@";; *) return 64;; esac; }
"""


@dataclass(frozen=True)
class Fence:
    """One fenced block: shell to run, or a file to write."""

    kind: str
    body: str
    title: str
    why_not: str


def fences(page: Path) -> list[Fence]:
    """Return the page's shell blocks and its YAML blocks that have a title."""
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', match["rest"])
        found.append(Fence(match["kind"], match["body"], title[1] if title else "", match["why"] or ""))
    return [fence for fence in found if fence.kind == "sh" or fence.title]


def commands(body: str) -> list[list[str]]:
    """Return the words of every `fusechat` command of a block, without comments and redirections."""
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fusechat ")]


ALL_COMMANDS = [
    (page.relative_to(ROOT), command)
    for page in PAGES
    for fence in fences(page)
    if fence.kind == "sh"
    for command in commands(fence.body)
]
PAGES_TO_RUN = [page for page in PAGES if any(fence.kind == "sh" and not fence.why_not for fence in fences(page))]


@pytest.mark.parametrize(
    ("page", "words"), ALL_COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_every_command_of_the_pages_parses(page: Path, words: list[str]) -> None:
    command, path = typer.main.get_command(app), "fusechat"
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"{page}: {path} has no command {name}"
        command, path = command.commands[name], f"{path} {name}"
    command.make_context(path, words)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.name == "README.md" else pytest.mark.slow) for page in PAGES_TO_RUN],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_run(page: Path, tiny_world: TinyWorld, tmp_path: Path) -> None:
    for kind, names in NAMES.items():
        for name in names:
            shutil.copytree(getattr(tiny_world, kind), tmp_path / name)
    lines = tiny_world.dialogues.read_text().splitlines()
    (tmp_path / "dialogues.jsonl").write_text(
        "\n".join(line.replace("Say", f"Say, {i},") for i in range(5) for line in lines)
    )
    environment = os.environ | {
        "PYTHON": sys.executable,
        "ROOT": str(ROOT),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for fence in fences(page):
        if fence.title:
            (tmp_path / fence.title).write_text(fence.body)
        elif not fence.why_not:
            done = subprocess.run(
                ["bash", "-c", PREAMBLE + fence.body],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{page.name}:\n{fence.body}\n{done.stderr[-2000:]}"


def test_the_loss_of_readme_runs_as_it_stands() -> None:
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert code is not None
    lm_head = torch.nn.Linear(8, 50, bias=False)
    labels = torch.randint(50, (6,))
    labels[0] = -100
    teacher = torch.randn(6, 50).log_softmax(-1).topk(4)
    names = {
        "hidden": torch.randn(6, 8),
        "lm_head": lm_head,
        "labels": labels,
        "teacher_ids": teacher.indices,
        "teacher_logprobs": teacher.values,
    }
    exec(code[1], names)
    assert lm_head.weight.grad is not None


def test_every_key_of_the_configuration_is_described() -> None:
    """A key without a word is an empty cell of the reference."""
    sections = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, BaseModel)]
    silent = [
        f"{section.__name__}.{key}"
        for section in sections
        if section.__module__ == config.__name__
        for key, field in section.model_fields.items()
        if not field.description and not isinstance(field.default, BaseModel)
    ]
    assert not silent


def test_the_pages_have_commands_at_all() -> None:
    # A pattern that matches nothing would leave the two tests above empty and green.
    assert len(ALL_COMMANDS) >= 10
    assert ROOT / "README.md" in PAGES_TO_RUN
