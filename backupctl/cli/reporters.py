# SPDX-License-Identifier: GPL-2.0-or-later
"""Which Reporter fits stderr; and what it was told, for the JSON document."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from backupctl.cli import logs
from backupctl.cli.output import (
    LINE_SECONDS,
    LineReporter,
    WarningReporter,
    print_to_stderr,
    progress_text,
)
from backupctl.events import Event
from backupctl.progress import Overall, Reporter

RELAYED = "backupctl"
_MOST_BYTES = 4000  # a pipe that takes more takes so much without waiting

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


class RelayReporter:
    """A Reporter of a process that works for another one: a line of JSON on stderr for each event.

    Nothing here waits. While the other process does not read, lines are left out: the notes and warnings are
    in the document as well.
    """

    def __init__(self) -> None:
        self._told = 0.0
        self._overall = Overall()

    def event(self, event: Event) -> None:
        """Write what happened."""
        if event.severity == "step":
            self._overall.step()
        self._write({"severity": event.severity, "text": event.text})

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """So much is copied."""
        self._overall.note(label, done_bytes, total_bytes)
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS and self._overall.total_bytes:
            self._told = now
            self._write({"severity": "progress", "text": progress_text(self._overall)})

    def _write(self, line: Mapping[str, str]) -> None:
        if logs.takes_more(sys.stderr):
            print_to_stderr([json.dumps({RELAYED: line})[:_MOST_BYTES]])


def relayed(line: str) -> Mapping[str, str] | None:
    """Return the severity and the text of a line of a RelayReporter; None for any other line."""
    with suppress(ValueError, TypeError, KeyError):
        found = json.loads(line)[RELAYED]
        return {"severity": str(found["severity"]), "text": str(found["text"])}
    return None


@contextmanager
def reporter(*, quiet: bool = False, relay: bool = False) -> Iterator[RecordingReporter]:
    """Give the Reporter that fits stderr. relay: another process of ours reads it."""
    if relay:
        yield RecordingReporter(RelayReporter())
        return
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
