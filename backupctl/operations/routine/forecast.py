# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run would do for a VM, and how much it would store at most. Changes and locks nothing."""

from dataclasses import dataclass
from datetime import UTC, datetime

from backupctl.errors import UNTOUCHED, Failed, Locked, Refused
from backupctl.names import DiskName, PointId, next_point_id
from backupctl.operations import status
from backupctl.operations.bitmaps import Known, nobody_else
from backupctl.operations.prune import retention
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import RetentionCandidate
from backupctl.operations.routine.run import Routine, is_full_due, is_restore_test_due
from backupctl.operations.status import DiskStatus, Status
from backupctl.options import Kind
from backupctl.vm.open_driver import refuse_skipped


@dataclass(frozen=True)
class DiskForecast:
    """How a disk would be taken: full, incremental, or by a scan. reason: why not by a bitmap, or "".

    most_bytes: what would be stored if all that the dirty bitmap names has changed; the size of the disk
    where no bitmap tells.
    """

    name: DiskName
    how: str
    reason: str
    most_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What a run would do. full_due: whether a policy asks for a full. dropped: None without a rule.

    restore_test_due: whether it would boot the new point; None if no restore test is configured.
    """

    kind: Kind
    full_due: bool
    disks: tuple[DiskForecast, ...]
    dropped: tuple[PointId, ...] | None
    verify_percent: float
    restore_test_due: bool | None = None

    @property
    def most_bytes(self) -> int:
        """How much would be stored at most."""
        return sum(disk.most_bytes for disk in self.disks)


def look(asked: Routine, known: Known = nobody_else) -> Forecast:
    """Tell what a run would do now. known: as for `status.look`.

    Raises VmIsOff if the backup would be skipped; Locked, Refused, or Failed if the VM cannot be reached;
    RepositoryError.
    """
    refuse_skipped(asked.vm, asked.options.timeouts)
    found = status.look(asked.vm, asked.repository, asked.options, known)
    if found.qemu is None:
        if asked.directory.lock_holder():
            raise Locked(found.problem, state=UNTOUCHED)
        raise Failed(found.problem, state=UNTOUCHED, next_command=f"backupctl doctor {asked.vm.name}")
    if found.refusal:
        raise Refused(found.refusal, state=UNTOUCHED, next_command=f"backupctl doctor {asked.vm.name}")
    due = is_full_due(asked)
    disks = tuple(_disk(one, found, full=due) for one in found.disks)
    kind: Kind = "full" if due or not found.points else "incremental"
    return Forecast(
        kind, due, disks, _dropped(asked, found), asked.policy.verify_percent, is_restore_test_due(asked)
    )


def _disk(one: DiskStatus, found: Status, *, full: bool) -> DiskForecast:
    if full:
        return DiskForecast(one.name, "full", "", one.size)
    dirty = [
        bitmap.dirty_bytes for bitmap in found.bitmaps if (bitmap.name, bitmap.node) == (one.bitmap, one.node)
    ]
    by_bitmap = one.next == "incremental" and dirty
    return DiskForecast(one.name, one.next, one.reason, dirty[0] if by_bitmap else one.size)


def _dropped(asked: Routine, found: Status) -> tuple[PointId, ...] | None:
    """Return what a prune would drop once the new point is there."""
    if asked.policy.rules.hold_nothing():
        return None
    if not found.points:
        return ()
    now = datetime.now(UTC)
    names = tuple(disk.name for disk in found.disks)
    coming = RetentionCandidate(next_point_id(now, found.points[-1]), now, names, False)
    return retention.dropped(prune.plan(asked.directory, asked.policy.rules, (coming,)))
