# SPDX-License-Identifier: GPL-2.0-or-later
"""What is seen on a terminal while a command works: the step under way, and a bar for each disk."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from backupctl.cli import output, units
from backupctl.cli.output import clean
from backupctl.events import Event
from backupctl.progress import Overall


class _Unfailing:
    """A stream whose failures nobody hears of: a closed terminal must not fail a run, or its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Bring out what can be brought out."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Rate(ProgressColumn):
    """The rate in the units of --limit (rich's own column counts in powers of 1000)."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{units.size(round(speed))}/s" if speed else "", style="progress.data.speed")


class ProgressReporter:
    """A Reporter for a terminal: the step under way, and a bar for each disk."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._bars: dict[str, TaskID] = {}
        self._overall = Overall()
        self._whole: TaskID | None = None

    def event(self, event: Event) -> None:
        """Write a line above the bars."""
        if event.severity == "step":
            self._overall.step()
            head, style = output.printable("· ", "- ", sys.stderr), "dim"
        else:
            head, style = ("! ", "yellow") if event.severity == "warning" else ("  ", "")
        line = output.wrapped(head, clean(event.text), "    ", sys.stderr)
        self._display.console.print(Text(line, style=style), soft_wrap=True)

    def progress(self, disk: str, done_bytes: int, total_bytes: int) -> None:
        """So much is copied."""
        if disk not in self._bars:
            self._bars[disk] = self._display.add_task(clean(disk), total=total_bytes)
        self._display.update(self._bars[disk], completed=done_bytes, total=total_bytes)
        self._overall.note(disk, done_bytes, total_bytes)
        if len(self._overall.labels) > 1:
            self._show_whole()

    def _show_whole(self) -> None:
        """Show a bar of all disks together, whose time left is that of the step."""
        if self._whole is None:
            self._whole = self._display.add_task("all disks")
        done, total = self._overall.done_bytes, self._overall.total_bytes
        self._display.update(self._whole, completed=done, total=total)


@contextmanager
def reporter() -> Iterator[ProgressReporter]:
    """Give the Reporter of a terminal."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    console = Console(file=cast("IO[str]", _Unfailing(sys.stderr)), highlight=False)
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as display:
        yield ProgressReporter(display)
