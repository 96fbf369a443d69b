# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard's eye on the scratch files of a run, and on the jobs that fill them.

With the fleecing view a full scratch file makes the guest's writes fail. The run looks that it does not come
to that. The guard looks after the run: one that does nothing about a scratch file that fills up, since it
hangs or was stopped, is killed; and it knows which jobs must end when the run is gone.
"""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Watched:
    """One scratch file. job: that fills it. give_up: bytes at which the run must end, None for never."""

    job: str
    descriptor: int
    give_up: int | None

    def overdue(self) -> bool:
        """Whether more of it is used than the run should have let happen."""
        return self.give_up is not None and used_bytes(self.descriptor) > self.give_up


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
        return tuple(one.job.replace("-job", "-lim") for one in self._watched if one.give_up is not None)

    @property
    def active(self) -> bool:
        """Whether there is anything to look at."""
        return any(one.give_up is not None for one in self._watched)

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
        if not any(one.overdue() for one in self._watched):
            self._overdue_since = None
        elif self._overdue_since is None:
            self._overdue_since = time.monotonic()
        elif time.monotonic() - self._overdue_since > PATIENCE_SECONDS and os.getppid() == self._run:
            with suppress(ProcessLookupError):
                os.kill(self._run, signal.SIGKILL)


def used_bytes(descriptor: int) -> int:
    """Return how much of a file holds data; room that was only set aside counts as none."""
    used = end = 0
    with suppress(OSError):  # no data any more
        while True:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            used += end - start
    return used
