# SPDX-License-Identifier: GPL-2.0-or-later
"""Which Reporter fits stderr; and what it was told, for the JSON document."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from backupctl.cli import logs
from backupctl.cli.output import LineReporter, WarningReporter
from backupctl.events import Event
from backupctl.progress import Reporter

_log = logging.getLogger("backupctl.events")


class RecordingReporter:
    """A Reporter that logs all, and hands it on to another one. events: the notes and warnings so far."""

    def __init__(self, shown_by: Reporter) -> None:
        self._shown_by = shown_by
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        """Keep a note or warning, and hand it on."""
        if event.severity != "step":
            self.events.append(event)
        level = logging.WARNING if event.severity == "warning" else logging.INFO
        _log.log(level, "%s", event.text, extra={"event": event})
        self._shown_by.event(event)

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Hand it on."""
        self._shown_by.progress(label, done_bytes, total_bytes)


@contextmanager
def reporter(*, quiet: bool = False) -> Iterator[RecordingReporter]:
    """Give the Reporter that fits stderr."""
    if quiet:
        yield RecordingReporter(WarningReporter())
        return
    if (
        not sys.stderr.isatty() or logs.current().verbose
    ):  # bars and the lines of -v would overwrite each other
        yield RecordingReporter(LineReporter())
        return
    from backupctl.cli import progress_bar  # noqa: PLC0415 - rich takes a tenth of a run's start; timers need none of it

    with progress_bar.reporter() as shown:
        yield RecordingReporter(shown)
