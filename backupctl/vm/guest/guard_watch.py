# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard's eye on the scratch files of a run, and on the jobs that fill them.

With the fleecing view a full scratch file makes the guest's writes fail. The run makes sure that this does
not happen, and the guard watches the run: one that does nothing about a scratch file that fills up, since
it hangs or was stopped, is killed. The guard also knows which jobs must end when the run is gone.
"""

import os
import signal
import time
from contextlib import suppress
from typing import NamedTuple

from backupctl.system import files

LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
PATIENCE_UNLIMITED_SECONDS = 1.0
"""Where QEMU itself does not hold the guest back meanwhile."""


class Watched(NamedTuple):
    """One scratch file.

    job: that fills it. abort_at: bytes at which the run must end, None for never. group: the throttle group
    by which QEMU holds the guest back before it is full, None if it does not.
    """

    job: str
    descriptor: int
    abort_at: int | None
    group: str | None

    def overdue(self) -> bool:
        """Whether more of it is used than the run should have let happen."""
        return self.abort_at is not None and files.used_bytes(self.descriptor) > self.abort_at


class Watch:
    """The scratch files of one run. run: its process."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._watched: list[Watched] = []
        self._overdue_since: float | None = None

    @property
    def jobs(self) -> tuple[str, ...]:
        """The jobs that the run has or may have."""
        return tuple(one.job for one in self._watched)

    @property
    def groups(self) -> tuple[str, ...]:
        """The throttle groups below those jobs."""
        return tuple(one.group for one in self._watched if one.group is not None)

    @property
    def active(self) -> bool:
        """Whether there is anything to look at."""
        return any(one.abort_at is not None for one in self._watched)

    def add(self, watched: Watched) -> None:
        """Watch one more."""
        self._watched.append(watched)

    def forget(self) -> None:
        """The jobs have ended."""
        while self._watched:
            os.close(self._watched.pop().descriptor)
        self._overdue_since = None

    def look(self) -> None:
        """Kill a run that has known for long that it must end, and does not."""
        overdue = [one for one in self._watched if one.overdue()]
        if not overdue:
            self._overdue_since = None
            return
        now = time.monotonic()
        self._overdue_since = self._overdue_since or now
        limited = all(one.group is not None for one in overdue)
        patience = PATIENCE_SECONDS if limited else PATIENCE_UNLIMITED_SECONDS
        if now - self._overdue_since > patience and os.getppid() == self._run:
            with suppress(ProcessLookupError):
                os.kill(self._run, signal.SIGKILL)
