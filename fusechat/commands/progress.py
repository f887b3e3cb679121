"""Progress: a bar with rate and remaining time where there is a terminal, a line per stage elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from fusechat.processes import rank
from fusechat.quantity import prefixed
from fusechat.reporter import Advance, Reporter


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{prefixed(speed)} {task.fields['unit']}/s" if speed else "", style="cyan")


class TerminalReporter(Reporter):
    """Draws one bar per stage and leaves one line with its time and result."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console = console
        self.progress = progress
        self.began: dict[str, float] = {}
        self.tasks: dict[str, TaskID] = {}

    def stage(self, name: str, unit: str) -> Advance:
        """Begin a stage."""
        self.began[name] = time.perf_counter()
        task = self.tasks[name] = self.progress.add_task(name, total=None, unit=unit)
        return lambda done, total: self.progress.update(task, completed=done, total=total)

    def done(self, name: str, note: str) -> None:
        """Replace the bar by a line."""
        self.progress.remove_task(self.tasks.pop(name))
        seconds = time.perf_counter() - self.began[name]
        self.console.print(f"[bold]{name:<21}[/bold] {seconds:6.1f} s  {note}", highlight=False)


@contextlib.contextmanager
def terminal_reporter() -> Iterator[TerminalReporter]:
    """Give a reporter whose bars are on stderr, so that stdout stays clean for results."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<21}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
    )
    console.quiet = rank() != 0  # one process of many speaks
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield TerminalReporter(console, progress)
