# SPDX-License-Identifier: GPL-2.0-or-later
"""Notes for `status` what a run is doing, as it goes on."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from backupctl.names import DiskName, PointId
from backupctl.progress import Overall
from backupctl.repository import activity
from backupctl.repository.activity import Activity, DiskActivity

_PAUSE_SECONDS = 0.5


@dataclass
class ActivityLog:
    """The activity of one run, in the file of its lock; written at each step and twice a second at most.

    Nothing is written while the guest is frozen: the run reports no step then.
    """

    lock: int
    command: str
    clock: Callable[[], datetime]
    monotonic: Callable[[], float] = time.monotonic
    _now: Activity = field(init=False)
    _written: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        started = activity.stamp(self.clock())
        self._now = Activity(self.command, os.getpid(), "prepare", None, started, started)

    def step(self, name: str, point: PointId | None) -> None:
        """Note the step that begins."""
        self._now = replace(self._now, step=name, point=point or self._now.point)
        self._write()

    def progress(self, disks: Mapping[DiskName, tuple[int, int, bool]], overall: Overall) -> None:
        """Note how far the copy is. disks: bytes done and in all, and whether the latter is an estimate."""
        if self.monotonic() - self._written < _PAUSE_SECONDS:
            return
        rate, left = overall.rate, overall.left_seconds
        self._now = replace(
            self._now,
            disks=tuple(DiskActivity(name, *values) for name, values in disks.items()),
            done_bytes=overall.done_bytes,
            total_bytes=overall.total_bytes,
            estimated=any(estimated for _, _, estimated in disks.values()),
            rate_bytes=None if rate is None else round(rate),
            left_seconds=None if left is None else round(left),
        )
        self._write()

    def _write(self) -> None:
        self._written = self.monotonic()
        self._now = replace(self._now, updated=activity.stamp(self.clock()))
        activity.write(self.lock, self._now)
