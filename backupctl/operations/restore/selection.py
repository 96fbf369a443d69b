# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks a restore of a point restores, and which it leaves out.

A point holds the disks that its run was told to back up. A disk that only earlier points hold is missing: it
is reported with its newest point before this one, or restored from there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.events.restore import DiskFromEarlierPoint, DisksNotRestored
from backupctl.names import DiskName, PointId
from backupctl.progress import Reporter
from backupctl.repository import chain, read_locks
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory


@dataclass(frozen=True)
class MissingDisk:
    """A disk that a point does not hold. point: the newest one before it that does."""

    name: DiskName
    point: PointId


@dataclass(frozen=True)
class Part:
    """A disk, and the point that it is taken from."""

    point: Point
    entry: DiskEntry


@dataclass(frozen=True)
class Selection:
    """What is to be restored, locked for reading. missing: what is left out."""

    parts: tuple[Part, ...]
    missing: tuple[MissingDisk, ...]

    @property
    def names(self) -> list[DiskName]:
        """The disks that are to be restored."""
        return [part.entry.name for part in self.parts]


@contextmanager
def chosen(
    directory: VmDirectory, wanted: PointId, disk: str | None, *, all_disks: bool, reporter: Reporter
) -> Iterator[Selection]:
    """Lock one disk of a point, or all; with `all_disks` also the missing ones at their own newest points.

    What is left out is reported as a warning. Raises UsageError, NoSuchPoint, DamageFound, Locked,
    RepositoryError.
    """
    if all_disks and disk is not None:
        raise UsageError("--all-disks and --disk are mutually exclusive", state=UNTOUCHED)
    with ExitStack() as held:
        point = held.enter_context(read_locks.reading(directory, wanted))
        absent = missing(directory, point)
        if disk is not None:
            yield Selection((_one(directory, point, disk, absent),), ())
            return
        parts = [Part(point, entry) for entry in point.manifest.disks]
        if not all_disks:
            _warn(point, absent, reporter)
            yield Selection(tuple(parts), absent)
            return
        for one in absent:
            other = held.enter_context(read_locks.reading(directory, one.point))
            parts += [Part(other, entry) for entry in other.manifest.disks if entry.name == one.name]
            reporter.event(DiskFromEarlierPoint(one.name, point.id, one.point))
        yield Selection(tuple(parts), ())


def missing(directory: VmDirectory, point: Point) -> tuple[MissingDisk, ...]:
    """Return the disks that points before this one hold, and this one does not. Raises RepositoryError."""
    newest = {
        entry.name: other.id
        for other in directory.scan_points().points
        if other.id < point.id
        for entry in other.manifest.disks
    }
    return tuple(MissingDisk(name, newest[name]) for name in newest if point.manifest.disk(name) is None)


def _one(directory: VmDirectory, point: Point, disk: str, absent: tuple[MissingDisk, ...]) -> Part:
    entry = point.manifest.disk(disk)
    if entry is not None:
        return Part(point, entry)
    newest = next((one.point for one in absent if one.name == disk), None)
    err = chain.no_such_disk(point, disk, newest)
    raise err.add(next_command=f"backupctl restore {directory.name} {newest} --disk {disk}" if newest else "")


def _warn(point: Point, absent: tuple[MissingDisk, ...], reporter: Reporter) -> None:
    if absent:
        reporter.event(DisksNotRestored(point.id, {one.name: one.point for one in absent}))
