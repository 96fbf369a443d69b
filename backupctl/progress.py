# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom the core tells what happens while it works; and how far that is, over all that moves at once.

The core prints nothing. It calls a Reporter; the command line shows a progress display, plain lines
or nothing at all.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from backupctl.events import Event

_WINDOW_SECONDS = 30.0
_SAMPLE_SECONDS = 1.0


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


class Overall:
    """How far all labels are together, with the rate of the last half minute and the time left.

    A Reporter is told of each disk by itself; what a user waits for is the end of all. A restore takes a step
    for each disk, so a new step begins a new count only if nothing of the old one is left.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._restart()

    def step(self) -> None:
        """Another step began."""
        if self.done_bytes >= self.total_bytes:
            self._restart()

    def _restart(self) -> None:
        self._parts: dict[str, tuple[int, int]] = {}
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """So much of one label is done. Less than before of the same one begins a new count."""
        if done_bytes < self._parts.get(label, (0, 0))[0]:
            self._restart()
        self._parts[label] = (done_bytes, total_bytes)
        now = self._clock()
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((now, self.done_bytes))
        while now - self._samples[0][0] > _WINDOW_SECONDS and len(self._samples) > 1:
            self._samples.popleft()

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that were noted, in that order."""
        return tuple(self._parts)

    @property
    def done_bytes(self) -> int:
        """What is done of all of them."""
        return sum(done for done, _ in self._parts.values())

    @property
    def total_bytes(self) -> int:
        """What all of them come to, as far as it is known."""
        return sum(total for _, total in self._parts.values())

    @property
    def rate(self) -> float | None:
        """Bytes a second, lately; None before there is anything to measure."""
        if not self._samples:
            return None
        began, before = self._samples[0]
        elapsed = self._clock() - began
        done = self.done_bytes - before
        return done / elapsed if elapsed >= _SAMPLE_SECONDS and done > 0 else None

    @property
    def left_seconds(self) -> float | None:
        """How long the rest takes at that rate; None if nobody knows."""
        rate, left = self.rate, self.total_bytes - self.done_bytes
        if left <= 0:
            return 0.0 if self._parts else None
        return left / rate if rate else None
