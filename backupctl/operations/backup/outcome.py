# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run writes down: its journal at the begin, its manifest at the end, its report for the caller."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from backupctl import __version__
from backupctl.names import DiskName, PointId, RepositoryId, VmName
from backupctl.operations.backup.plan import Plan
from backupctl.options import Kind
from backupctl.repository.journal import Journal, JournalDisk
from backupctl.repository.manifest import DiskEntry, FreezeEntry, Manifest

Consistency = Literal["filesystem", "crash"]


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
