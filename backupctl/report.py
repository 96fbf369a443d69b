# SPDX-License-Identifier: GPL-2.0-or-later
"""What the core tells whoever started it: while it works (Reporter) and at the end (RunReport).

The core prints nothing. It calls a Reporter; the command line shows a progress display, plain lines
or nothing at all.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Protocol

from backupctl.errors import Interrupted
from backupctl.names import DiskName, PointId, VmName
from backupctl.settings import Kind

Consistency = Literal["filesystem", "crash"]


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

    def progress(self, disk: DiskName, done_bytes: int, total_bytes: int) -> None:
        """So much of a disk's dirty extents is copied. Called at most a few times a second per disk."""


class Silent:
    """A Reporter that says nothing."""

    def step(self, text: str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""

    def progress(self, disk: DiskName, done_bytes: int, total_bytes: int) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class DiskReport:
    """What one disk's part of a point came to; sizes in bytes.

    kind: "full" or "incremental" (a disk can be full inside an incremental point).
    dirty_bytes: what the bitmap (or, for a full, the allocation map) named.
    copied_bytes: data read from the VM. zero_bytes: named, but read as zeroes, so not read.
    unchanged_bytes: of an incremental, the content was as before, so it isn't stored.
    stored_bytes: what the image takes in the repository. scanned: the disk was read whole, for want of
    a bitmap, and compared. reason: why it was scanned or taken full in an incremental point, "" otherwise.
    damaged: older points from which this disk can't be restored any more, as far as the run met damage.
    """

    name: DiskName
    kind: Kind
    size: int
    dirty_bytes: int
    copied_bytes: int
    zero_bytes: int
    unchanged_bytes: int
    stored_bytes: int
    scanned: bool
    reason: str = ""
    damaged: tuple[PointId, ...] = ()


@dataclass(frozen=True)
class RunReport:
    """What a finished full or incremental came to.

    frozen_ms: how long the guest's file systems were frozen; None if they were not. damaged: older points
    that can't be restored any more, each with a disk ("": all), also one that this run did not take.
    missing_disks: those that earlier points hold and the VM has not any more, each with the newest point that
    holds it.
    """

    vm: VmName
    point: PointId
    kind: Kind
    parent: PointId | None
    disks: tuple[DiskReport, ...]
    frozen_ms: int | None
    consistency: Consistency
    seconds: float
    damaged: tuple[tuple[PointId, DiskName], ...] = ()
    missing_disks: tuple[tuple[DiskName, PointId], ...] = ()


class Stop:
    """Whether the run was asked to end.

    A signal only raises a flag; the run looks at it between steps and while it copies. An exception
    thrown into the middle of a clean-up would leave the clean-up half done.
    """

    def __init__(self) -> None:
        self._why = ""

    def request(self, why: str) -> None:
        """Ask the run to end; `why` becomes part of the error's message."""
        self._why = self._why or why

    @property
    def requested(self) -> bool:
        """Whether the run was asked to end."""
        return bool(self._why)

    def check(self) -> None:
        """Raise Interrupted if the run was asked to end."""
        if self._why:
            raise Interrupted(f"stopped by {self._why}")

    def also(self, check: Callable[[], None]) -> "Stop":
        """Return a Stop that ends when this one does, or when `check` raises."""
        return _StopAlso(self, check)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGHUP into a request to end, until the block ends. Main thread only."""

        def handler(number: int, _frame: FrameType | None) -> None:
            self.request(signal.Signals(number).name)

        before = {
            number: signal.signal(number, handler)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


class _StopAlso(Stop):
    """A Stop that looks at something more; asked to end is the first one."""

    def __init__(self, first: Stop, check: Callable[[], None]) -> None:
        super().__init__()
        self._first = first
        self._check = check

    def request(self, why: str) -> None:
        self._first.request(why)

    @property
    def requested(self) -> bool:
        return self._first.requested

    def check(self) -> None:
        self._first.check()
        self._check()
