# SPDX-License-Identifier: GPL-2.0-or-later
"""What the core tells whoever started it: while it works (Reporter) and at the end (RunReport).

The core prints nothing. It calls a Reporter; the command line shows a progress display, plain lines
or nothing at all.
"""

from typing import Protocol


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 point", "1,200 points"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Reporter(Protocol):
    """What the core calls while it works. None of these may raise or block for long."""

    def step(self, text: str) -> None:
        """A protocol step begins."""

    def note(self, text: str) -> None:
        """Something the user should know, e.g. why a disk is taken full."""

    def warn(self, text: str) -> None:
        """Something the user should act on some time."""

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Bytes are done. label: of a disk, or of a VM. Called at most a few times a second for each."""


class Silent:
    """A Reporter that says nothing."""

    def step(self, text: str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Say nothing."""
