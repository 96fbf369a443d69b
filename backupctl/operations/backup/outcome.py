# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run records: its journal at the start, its manifest at the end, its report for the caller."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from backupctl import __version__
from backupctl.names import DiskName, PointId, RepositoryId, VmName
from backupctl.operations.backup.plan import Plan
from backupctl.options import Kind
from backupctl.repository.journal import Journal, JournalDisk
from backupctl.repository.manifest import Consistency, DiskEntry, FreezeEntry, Manifest


@dataclass(frozen=True)
class RunReport:
    """The result of a finished full or incremental.

    disks: as in the point's manifest. frozen_ms: how long the guest's file systems were frozen; None if they
    were not. damaged: older points that cannot be restored any more, each with a disk ("": all), which may be
    one that this run did not back up. missing_disks: those that earlier points hold and the VM no longer has,
    each with the newest point that holds it.
    """

    vm: VmName
    point: PointId
    kind: Kind
    parent: PointId | None
    disks: tuple[DiskEntry, ...]
    frozen_ms: int | None
    consistency: Consistency
    seconds: float
    damaged: tuple[tuple[PointId, DiskName], ...] = ()
    missing_disks: tuple[tuple[DiskName, PointId], ...] = ()

    def damaged_points(self, disk: DiskName) -> tuple[PointId, ...]:
        """Return the older points from which a disk cannot be restored any more."""
        return tuple(point for point, name in self.damaged if name == disk)


def journal(point: PointId, vm: VmName, repository: RepositoryId, plan: Plan, started: datetime) -> Journal:
    """Return the journal of a run that is about to touch the VM."""
    return Journal(
        point=point,
        vm=vm,
        repository=repository,
        kind=plan.kind,
        step="attach",
        started=_stamp(started),
        pid=os.getpid(),
        disks=tuple(
            JournalDisk(one.disk.name, one.disk.node, number, one.base)
            for number, one in enumerate(plan.disks)
        ),
        froze=False,
    )


def manifest(
    begun: Journal,
    parent: PointId | None,
    disks: tuple[DiskEntry, ...],
    freeze: FreezeEntry,
    qemu: str,
    checkpoints: int,
) -> Manifest:
    """Return the manifest of the run that began with this journal and is complete."""
    return Manifest(
        point=begun.point,
        kind="incremental" if parent else "full",
        parent=parent,
        vm=begun.vm,
        repository=begun.repository,
        disks=disks,
        freeze=freeze,
        consistency="crash" if freeze.milliseconds is None else "filesystem",
        qemu=qemu,
        backupctl=__version__,
        start=begun.started,
        end=_stamp(datetime.now(UTC)),
        checkpoints=checkpoints,
    )


def report(made: Manifest, seconds: float, damaged: Sequence[tuple[PointId, DiskName]] = ()) -> RunReport:
    """Return the report on a committed point. damaged: as in the plan."""
    return RunReport(
        vm=made.vm,
        point=made.point,
        kind=made.kind,
        parent=made.parent,
        disks=made.disks,
        frozen_ms=made.freeze.milliseconds,
        consistency=made.consistency,
        seconds=seconds,
        damaged=tuple(damaged),
    )


def _stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
