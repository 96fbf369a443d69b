# SPDX-License-Identifier: GPL-2.0-or-later
"""What is due for a VM, by its policies in the configuration: pure functions."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from backupctl.names import VmName
from backupctl.operations.prune.retention import Rules
from backupctl.options import Kind
from backupctl.repository.point import Point
from backupctl.repository.tested import RestoreTests

_TOLERANCE = timedelta(hours=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Policy:
    """What is to be done for a VM beside an incremental.

    full_every: how often all disks are to be read whole; None for never. rules: what a prune keeps; without
    any nothing is pruned. verify_percent: how much of the data to verify each time; 0 for none.
    restore_test_every: how often the newest point is to be booted; None for never.
    """

    full_every: timedelta | None = None
    rules: Rules = field(default_factory=Rules)
    verify_percent: float = 0.0
    restore_test_every: timedelta | None = None


def backup_kind(vm: VmName, points: Sequence[Point], every: timedelta | None, now: datetime) -> Kind:
    """Return what kind of backup is due. points: the committed ones.

    Time is divided into periods of the length `every`, and each needs a full. They begin at another time for
    each VM, so that not all are taken full in the same night. Nothing is remembered, so nothing can be wrong:
    if the full of a period fails, the next run tries again. A prune that drops the full of the last period
    merges it into a younger point, which is a full then; so only the current period is looked at. A full
    whose clock was wrong lies in another period, and does not count.
    """
    if not every:
        return "incremental"
    current = _period(vm, now, every)
    full = (point.manifest.started for point in points if point.manifest.kind == "full")
    return "incremental" if any(_period(vm, taken, every) == current for taken in full) else "full"


def is_restore_test_due(tests: RestoreTests | None, every: timedelta, now: datetime) -> bool:
    """Return whether a point is to be booted. tests: what the last tests came to.

    After a failure each run tries again. A test counts as a little older than it is, because no two runs
    begin at the same second. One of the future, of a clock that was wrong, does not count.
    """
    if tests is None or not tests.passed or tests.passed_at is None:
        return True
    age = now - tests.passed_at
    return age < timedelta(0) or age + min(_TOLERANCE, every / 4) >= every


def _period(vm: VmName, time: datetime, length: timedelta) -> int:
    shift = timedelta(seconds=zlib.crc32(vm.encode()) % max(int(length.total_seconds()), 1))
    return (time - _EPOCH + shift) // length
