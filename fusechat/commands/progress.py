"""Progress: a bar with rate and remaining time where there is a terminal; elsewhere a line when a stage is done and,
while it works, one a minute."""

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

_LINE_SECONDS = 60.0  # a log is to say that a stage of hours goes on, and how far, without being filled by it


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{prefixed(speed)} {task.fields['unit']}/s" if speed else "", style="cyan")


class TerminalReporter(Reporter):
    """Draws one bar per stage, or says where it is, and leaves one line with its time and result."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console = console
        self.progress = progress
        self.began: dict[str, float] = {}
        self.tasks: dict[str, TaskID] = {}

    def stage(self, name: str, unit: str) -> Advance:
        """Begin a stage."""
        self.began[name] = told = time.perf_counter()
        task = self.tasks[name] = self.progress.add_task(name, total=None, unit=unit)

        def advance(done: int, total: int) -> None:
            nonlocal told
            self.progress.update(task, completed=done, total=total)
            now = time.perf_counter()
            if not self.console.is_terminal and now - told >= _LINE_SECONDS:
                told = now
                # An extraction can say how much there is only when its first shard is done.
                self._line(name, f"{done:,} of {total:,} {unit}" if total > done else f"{done:,} {unit}")

        return advance

    def done(self, name: str, note: str) -> None:
        """Replace the bar by a line."""
        self.progress.remove_task(self.tasks.pop(name))
        self._line(name, note)

    def _line(self, name: str, note: str) -> None:
        seconds = time.perf_counter() - self.began[name]
        # Names and reasons are a user's, and a template's [/INST] is no markup.
        self.console.print(Text(f"{name:<21}", "bold"), f"{seconds:6.1f} s  {note}", highlight=False, markup=False)


@contextlib.contextmanager
def terminal_reporter() -> Iterator[TerminalReporter]:
    """Give a reporter whose bars are on stderr, so that stdout stays clean for results."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<21}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
    )
    console.quiet = rank() != 0  # one process of many speaks
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield TerminalReporter(console, progress)
