# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run writes down: its journal at the begin, its manifest at the end, its report for the caller."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime

from backupctl import __version__
from backupctl.names import DiskName, PointId, RepositoryId, VmName
from backupctl.planning import Plan
from backupctl.report import DiskReport, RunReport
from backupctl.repository.journal import Journal, JournalDisk
from backupctl.repository.manifest import DiskEntry, FreezeEntry, Manifest


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
    """Return what the caller is told of a committed point. damaged: as in the plan."""
    return RunReport(
        vm=made.vm,
        point=made.point,
        kind=made.kind,
        parent=made.parent,
        disks=tuple(
            DiskReport(
                name=entry.name,
                kind=entry.kind,
                size=entry.size,
                dirty_bytes=entry.dirty_bytes,
                copied_bytes=entry.copied_bytes,
                zero_bytes=entry.zero_bytes,
                unchanged_bytes=entry.unchanged_bytes,
                stored_bytes=entry.stored_bytes,
                scanned=entry.scanned,
                reason=entry.reason,
                damaged=tuple(point for point, disk in damaged if disk == entry.name),
            )
            for entry in made.disks
        ),
        frozen_ms=made.freeze.milliseconds,
        consistency=made.consistency,
        seconds=seconds,
        damaged=tuple(damaged),
    )


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
