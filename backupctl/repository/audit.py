# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM's history says, compared with its directory: which points are missing, or were replaced.

A repository that has no history yet, or into which somebody copied a point, is not a problem: the next run or
prune records what is there. Nor does a crash between any two steps leave a problem: see history.py.
"""

import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from backupctl.errors import DamageFound, RepositoryError
from backupctl.names import PointId
from backupctl.repository import history, point_names
from backupctl.repository.history import History, Known, PointEvent
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import AllPoints, ScannedPoints, VmDirectory

_LOOKS = 5


@dataclass(frozen=True)
class Problem:
    """One difference from the history. point: whose, None if the history itself was changed.

    missing: whether the point is gone.
    """

    point: PointId | None
    message: str
    missing: bool = False


def problems(directory: VmDirectory, scanned: ScannedPoints | None = None) -> tuple[Problem, ...]:
    """Compare a VM's directory with its history. Changes and locks nothing. Raises RepositoryError.

    scanned: the committed points, from a caller who holds the VM's lock. A run or a prune may be running
    otherwise: a difference counts only if the history is still the same afterwards.
    """

    def look(known: History) -> Iterator[Problem]:
        yield from _flaws(directory, known)
        yield from _missing(directory, known)
        # What cannot be read is reported as that.
        yield from _replaced(directory, known, (scanned or directory.scan_points(tolerant=True)).points)

    return _compared(directory, look)


def missing(directory: VmDirectory) -> tuple[PointId, ...]:
    """Return the points that were committed, that no prune dropped, and that are gone, oldest first.

    Opens none of those that are there. Raises RepositoryError.
    """
    found = _compared(directory, partial(_missing, directory))
    return tuple(sorted(one.point for one in found if one.point is not None))


def _compared(directory: VmDirectory, look: Callable[[History], Iterable[Problem]]) -> tuple[Problem, ...]:
    """Return the differences that `look` finds, while the history stays the same."""
    found: tuple[Problem, ...] = ()
    for _ in range(_LOOKS):
        known = history.read(directory.path)
        if known is None:
            return ()
        found = tuple(look(known))
        again = history.read(directory.path) if found else None
        if not found or (again is not None and again.content == known.content):
            break
    return found


def is_unfinished(directory: VmDirectory, point: PointId) -> bool:
    """Whether a point that is not there was never committed, by its directory or by the history."""
    known = history.read(directory.path)
    undone = known is not None and point in known.points and not known.points[point].there
    return undone or any(partial.point == point for partial in directory.pending_points())


def was_dropped(directory: VmDirectory, point: PointId) -> bool:
    """Whether the history says that a point was dropped. Raises RepositoryError."""
    known = history.read(directory.path)
    return known is not None and known.points.get(point, Known()).dropped


def refuse_missing(directory: VmDirectory, wanted: str) -> None:
    """Raise DamageFound if the history says that a point must be there, and it is missing.

    wanted: its id or the beginning of that, or "latest" where there is none at all.
    """
    for one in reversed(problems(directory)):
        if one.missing and (wanted == point_names.LATEST or (one.point or "").startswith(wanted)):
            raise DamageFound(
                one.message, state="nothing was changed", next_command=f"backupctl verify {directory.name}"
            )


def reconcile(directory: VmDirectory, points: AllPoints | None = None) -> None:
    """Record what a crash, or somebody who copied points, left unrecorded. Raises RepositoryError.

    The caller holds the VM's lock. points: those of the VM, if they are known. What `problems` reports stays
    reported.
    """
    found = history.read(directory.path)
    known = {} if found is None else found.points
    scanned, retired = points or directory.scan_all()
    events = [event for point in scanned.points for event in _owed(point, known.get(point.id, Known()))]
    dropped = [*(point.path for point in retired.points), *(path for path, _ in retired.damaged)]
    ids = [PointId(path.name) for path in dropped]
    events += [PointEvent("dropped", point) for point in ids if known.get(point, Known()).there]
    if events or found is None:
        history.record(directory.path, *events)


def _owed(point: Point, known: Known) -> Iterator[PointEvent]:
    """Yield what the history lacks of a point that is there."""
    if not known.there and not known.dropped:
        yield PointEvent("found", point.id, point.manifest.checksum)
    elif len(known.manifests) > 1 and point.manifest.checksum in known.manifests:
        yield PointEvent("changed", point.id, point.manifest.checksum)


def _flaws(directory: VmDirectory, known: History) -> Iterator[Problem]:
    for flaw in known.flaws:
        path = directory.path / history.FILE_NAME
        yield Problem(None, f"{path}: {flaw}, so points may be missing without a record")


def _missing(directory: VmDirectory, known: History) -> Iterator[Problem]:
    listed = frozenset(directory.all_points())
    for point, one in sorted(known.points.items()):
        if one.there and point not in listed and not _is_there(directory, point):
            yield Problem(
                point,
                f"the recovery point {point} of {directory.name} is missing: it was committed, "
                f"no prune dropped it, and {directory.path / point} is gone",
                missing=True,
            )


def _replaced(directory: VmDirectory, known: History, points: Iterable[Point]) -> Iterator[Problem]:
    for found in points:
        one = known.points.get(found.id, Known())
        checksum = found.manifest.checksum
        if one.dropped:
            text = "was dropped by a prune and is there again: an older copy was put back"
        elif not one.there or checksum in one.manifests:
            continue
        elif checksum in one.older:
            text = "was replaced by an older copy, from before a prune"
        else:
            text = "was replaced: its manifest is not the one that was committed"
        yield Problem(found.id, f"the recovery point {found.id} of {directory.name} {text}; see {found.path}")


def _is_there(directory: VmDirectory, point: PointId) -> bool:
    """Whether a point is there, unfinished or not."""
    # In the order of the commit's rename: the other way round, a commit between the looks would hide the
    # point.
    return any(
        _is_directory(path)
        for path in (PendingPoint(directory.path, directory.name, point).path, directory.path / point)
    )


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as err:
        raise RepositoryError(f"cannot access {path}: {err.strerror}") from err
