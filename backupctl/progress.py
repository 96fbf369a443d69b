# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom the core tells what happens while it works.

The core prints nothing. It calls a Reporter; the command line shows a progress display, plain lines
or nothing at all.
"""

from typing import Protocol

from backupctl.events import Event


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 point", "1,200 points"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Reporter(Protocol):
    """What the core calls while it works. None of these may raise or block for long."""

    def event(self, event: Event) -> None:
        """Something happened: a step began, or something that the user or a program should know."""

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Bytes are done. label: of a disk, or of a VM. Called at most a few times a second for each."""


class Silent:
    """A Reporter that does nothing."""

    def event(self, event: Event) -> None:
        """Do nothing."""

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Do nothing."""
