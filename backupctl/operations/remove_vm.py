# SPDX-License-Identifier: GPL-2.0-or-later
"""Removing a VM with all its points from a repository, and giving it another name there."""

from dataclasses import dataclass

from backupctl.errors import UNTOUCHED, Refused, TargetExists, UsageError
from backupctl.names import PointId, VmName
from backupctl.operations import usage
from backupctl.repository import former_names, markers, relocate, summary
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory


@dataclass(frozen=True)
class RemovalAllowed:
    """What else may go. protected: protected points. unfinished: what a run left that did not end."""

    protected: bool = False
    unfinished: bool = False


@dataclass(frozen=True)
class VmRemoval:
    """What was removed of a VM, or would be.

    points: all, with those that were dropped already. finished: whether an earlier removal, which did not
    end, was finished, too.
    """

    vm: VmName
    points: tuple[PointId, ...]
    protected: tuple[PointId, ...]
    unfinished: tuple[PointId, ...]
    freed_bytes: int
    finished: bool


def plan(directory: VmDirectory, may: RemovalAllowed) -> VmRemoval:
    """Tell what `remove` would do. Changes and locks nothing. Raises NoSuchPoint, UsageError, Refused."""
    left = relocate.removed(directory)
    if not left:
        directory.refuse_unknown()
    points = tuple(directory.all_points())
    protected = tuple(one for one in points if markers.has(directory.path / one, markers.PROTECTED))
    unfinished = _unfinished(directory)
    _refuse(directory, protected, unfinished, may)
    freed = sum(map(usage.tree_bytes, (directory.path, *left)))
    return VmRemoval(directory.name, points, protected, unfinished, freed, bool(left))


def remove(directory: VmDirectory, may: RemovalAllowed) -> VmRemoval:
    """Remove all that the repository has of a VM; finish a removal that was killed. The VM is not touched.

    Raises NoSuchPoint, UsageError or Refused for what may not go, Locked, RepositoryError.
    """
    planned = plan(directory, may)
    relocate.finish_removal(directory)
    if directory.exists():  # else only the rest of an earlier removal was there
        with relocate.alone(directory):
            planned = VmRemoval(**{**vars(plan(directory, may)), "finished": planned.finished})
            relocate.remove(directory)
    return planned


def rename(repository: Repository, old: VmName, new: VmName, *, dry_run: bool) -> bool:
    """Give a VM another name in the repository; False if it has that name already, by an earlier call.

    Raises NoSuchPoint, TargetExists, Refused for an unfinished run, UsageError, Locked, RepositoryError.
    """
    if old == new:
        raise UsageError("the old and the new name are the same", state=UNTOUCHED)
    directory, target = repository.vm(old), repository.vm(new)
    if not directory.exists() and any(one.name == old for one in former_names.read(target.path)):
        return False
    directory.refuse_unknown()
    if target.exists():
        raise TargetExists(f"the repository has a VM {new} already", state=UNTOUCHED)
    if dry_run:
        _refuse_unfinished(directory, _unfinished(directory))
        return True
    with relocate.alone(directory):
        _refuse_unfinished(directory, _unfinished(directory))
        relocate.rename(directory, new)
        summary.renew(target)
    return True


def _unfinished(directory: VmDirectory) -> tuple[PointId, ...]:
    """Return the points of runs that did not end; what a prune was removing is none of them."""
    return tuple(one.point for one in directory.pending_points() if not _is_retired(one))


def _is_retired(one: PendingPoint) -> bool:
    return markers.has(one.path, markers.RETIRED)


def _refuse(
    directory: VmDirectory,
    protected: tuple[PointId, ...],
    unfinished: tuple[PointId, ...],
    may: RemovalAllowed,
) -> None:
    if protected and not may.protected:
        raise UsageError(
            f"protected: {', '.join(protected)}",
            state=UNTOUCHED,
            hint="use --protected to remove protected points, too",
        )
    if not may.unfinished:
        _refuse_unfinished(directory, unfinished)


def _refuse_unfinished(directory: VmDirectory, unfinished: tuple[PointId, ...]) -> None:
    # Only the journal of such a run tells whether the guest is frozen by us, and which nodes are ours.
    if unfinished:
        raise Refused(
            f"a run of {directory.name} did not end: {', '.join(unfinished)}",
            state=UNTOUCHED,
            next_command=f"backupctl recover {directory.name}",
        )
