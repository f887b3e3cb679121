"""What a run says where there is no terminal: that it goes on, and how far, now and then."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.progress import Progress

from fusechat.commands import progress
from fusechat.commands.results import print_results


def _told(monkeypatch: pytest.MonkeyPatch, console: Console) -> list[str]:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    reporter = progress.TerminalReporter(console, Progress(console=console, disable=True))
    with console.capture() as said:
        advance = reporter.stage("extract pivot", "tokens")
        for now in (1.0, 59.0, 61.0, 62.0, 119.0, 3600.0):
            advance(int(now), 7200 if now > 61.0 else int(now))
        reporter.done("extract pivot", "9 rows")
    return [" ".join(line.split()) for line in said.get().splitlines()]


def test_a_log_hears_of_a_long_stage_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stage of hours that is silent under nohup or a scheduler, and one that fills the log."""
    assert _told(monkeypatch, Console(force_terminal=False, width=80)) == [
        "extract pivot 61.0 s 61 tokens",
        "extract pivot 3600.0 s 3,600 of 7,200 tokens",
        "extract pivot 3600.0 s 9 rows",
    ]


def test_brackets_of_names_and_reasons_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends in a MarkupError because a dialogue was skipped for a template's [/INST]."""
    console = Console(force_terminal=False, width=80)
    reporter = progress.TerminalReporter(console, Progress(console=console, disable=True))
    with console.capture() as said:
        reporter.stage("extract [b]", "tokens")
        reporter.done("extract [b]", "1 × b'[/INST]' does not match the text")
    assert said.get().startswith("extract [b] ")
    assert said.get().endswith("s  1 × b'[/INST]' does not match the text\n")


def test_a_table_of_results_shows_categories_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    model = {"bits_per_byte": [1.0, 0.9, 1.1], "difference_to_sft": [0.0, 0.0, 0.0], "p_holm": None}
    shown = {"models": {"sft": model, "target [/INST]": model}, "n_dialogues": 2, "content_bytes": 9}
    results = {"groups": {"overall": shown, "[math]": shown}, "excluded_dialogues": 0}
    print_results(results)
    said = capsys.readouterr().out
    assert "target [/INST]" in said
    assert "[math]" in said


def test_a_terminal_has_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(_told(monkeypatch, Console(force_terminal=True, color_system=None, width=80))) == 1
