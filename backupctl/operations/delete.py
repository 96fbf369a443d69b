# SPDX-License-Identifier: GPL-2.0-or-later
"""Deleting points by name, in the way of a prune: what others depend on is merged into them.

The newest point of a disk is special. The VM has a bitmap of what changed since, and without the point that
is of no use: the next run, or `recover`, gives its record to the bitmap of the point before, if the VM keeps
that (--keep-checkpoints), and removes it. Otherwise the next incremental reads all of the disk and compares
it with the newest point that is left. Nothing is lost either way, but it takes time, so it must be asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, Failed, Locked, NoSuchPoint, UsageError
from backupctl.events.prune import NextRunReadsAll
from backupctl.names import DiskName, PointId
from backupctl.operations import usage
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.survey import Survey
from backupctl.progress import Reporter
from backupctl.repository import history, point_names
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory


@dataclass(frozen=True)
class Permissions:
    """What else may go. protected: points that are protected. newest: the newest point of a disk."""

    protected: bool = False
    newest: bool = False


@dataclass(frozen=True)
class Deletion:
    """What was deleted, or would be.

    points: those that were named. already: those of them that had been dropped before. newest: the disks
    whose newest point goes, each with that. freed_bytes: in all; of a dry run an estimate, None if it cannot
    be made. left: what the next prune has to do, and why.
    """

    points: tuple[PointId, ...]
    already: tuple[PointId, ...]
    newest: tuple[tuple[DiskName, PointId], ...]
    freed_bytes: int | None
    left: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """Which points were named: those that are there, and those that had been dropped before."""

    going: tuple[Point, ...]
    already: tuple[PointId, ...]
    newest: tuple[tuple[DiskName, PointId], ...]


def plan(directory: VmDirectory, wanted: Sequence[str], may: Permissions) -> Deletion:
    """Tell what `delete` would do. Changes and locks nothing. Raises as `delete`."""
    directory.refuse_unknown()
    survey = Survey(directory)
    survey.update()
    choice = _choose(directory, survey, wanted, may)
    points = tuple(point.id for point in choice.going)
    freed = usage.freed_by(directory, points)
    return Deletion(points, choice.already, choice.newest, None if freed is None else sum(freed.values()))


def delete(
    directory: VmDirectory, wanted: Sequence[str], may: Permissions, reporter: Reporter, stop: Cancellation
) -> Deletion:
    """Drop the points that are named, and clear up after them as a prune does.

    wanted: ids, or beginnings of ids. A point that was dropped before is no error, so that the command can be
    repeated after a crash. Raises NoSuchPoint, AmbiguousPoint, UsageError for what may not go, Locked if a
    point is in use; further as `prune.prune`.
    """
    directory.refuse_unknown()
    chosen: list[_Choice] = []

    def choose(survey: Survey) -> tuple[PointId, ...]:
        choice = _choose(directory, survey, wanted, may)
        chosen.append(choice)
        for disk, point in choice.newest:
            reporter.event(NextRunReadsAll(disk, point))
        return tuple(point.id for point in choice.going)

    try:
        report = prune.drop(directory, choose, reporter, stop, protected=may.protected)
    except Failed as err:
        if chosen:
            raise _resumable(err, directory, chosen[0]) from err
        raise
    choice = chosen[0]
    if in_use := {point.id for point in choice.going} - set(report.dropped):
        raise Locked(
            f"in use and not deleted: {', '.join(sorted(in_use))}",
            state=prune.STATE,
            hint="try again when the restore, serve or verify that reads it has ended",
        )
    return Deletion(
        report.dropped, choice.already, choice.newest, report.freed_bytes, report.left, report.damage
    )


def _resumable(err: Failed, directory: VmDirectory, choice: _Choice) -> Failed:
    """Add how a deletion goes on that failed or was interrupted."""
    ids = " ".join(point.id for point in choice.going)
    again = f"backupctl delete {directory.name} {ids}" if ids else "backupctl delete"
    return err.add(
        state=prune.STATE,
        hint="run the same command again: it continues where this one stopped",
        next_command=again,
    )


def _choose(directory: VmDirectory, survey: Survey, wanted: Sequence[str], may: Permissions) -> _Choice:
    current = {point.id: point for point in survey.current()}
    retired = {point.id for point in survey.retired()}
    named = dict.fromkeys(_meant(directory, one, (*current, *retired)) for one in wanted)
    going = tuple(current[point] for point in sorted(named) if point in current)
    newest = _newest(survey.current(), {point.id for point in going})
    _refuse(directory, going, newest, may)
    return _Choice(going, tuple(sorted(point for point in named if point not in current)), newest)


def _meant(directory: VmDirectory, wanted: str, ids: Sequence[PointId]) -> PointId:
    """Return the point that is meant, also a dropped one. Raises NoSuchPoint, AmbiguousPoint."""
    try:
        return point_names.resolve(wanted, sorted(ids), directory.name)
    except NoSuchPoint:
        known = history.read(directory.path) if point_names.is_id(wanted) else None
        if known is None or not known.points.get(PointId(wanted), history.Known()).dropped:
            raise
        return PointId(wanted)


def _newest(points: Sequence[Point], going: set[PointId]) -> tuple[tuple[DiskName, PointId], ...]:
    """Return the disks whose newest point goes."""
    newest = {entry.name: point.id for point in points for entry in point.manifest.disks}
    return tuple(sorted((disk, point) for disk, point in newest.items() if point in going))


def _refuse(
    directory: VmDirectory,
    going: Sequence[Point],
    newest: Sequence[tuple[DiskName, PointId]],
    may: Permissions,
) -> None:
    if not may.protected and (held := [point.id for point in going if point.protected]):
        raise UsageError(
            f"protected: {', '.join(held)}",
            state=UNTOUCHED,
            hint=f"use --protected, or `backupctl unprotect {directory.name} {held[0]}` first",
        )
    if newest and not may.newest:
        listed = ", ".join(f"{point} of {disk}" for disk, point in newest)
        raise UsageError(
            f"the newest point would be deleted: {listed}; the next incremental would have to read all of "
            f"{', '.join(disk for disk, _ in newest)}",
            state=UNTOUCHED,
            hint="use --newest to delete it all the same",
        )
