# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks for reading a point, which keep a prune from changing the layers that it depends on.

A reader has a shared lock on the directory of its point and of each point below. A prune takes them
exclusively before it changes what a reader could see, and leaves a point that is being read for the next
prune.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backupctl.errors import BackupctlError, Locked
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import locks

_PATIENCE_SECONDS = 30.0  # to replace an image by a merged one takes a few fsyncs
_TRIES = 5


@contextmanager
def reading(directory: VmDirectory, wanted: str) -> Iterator[Point]:
    """Lock a point (an id, or "latest") and all below it for as long as the block lasts.

    Yields the point as it is while it is locked: a prune may just have given it another parent. Raises
    NoSuchPoint, DamageFound, Locked, RepositoryError.
    """
    for _ in range(_TRIES):
        point = directory.point(wanted)
        needed = _needed(directory, point)
        with ExitStack() as held:
            try:
                for path in needed:
                    held.enter_context(locks.directory(path, _PATIENCE_SECONDS, shared=True))
            except FileNotFoundError:
                continue  # pruned before it was locked
            # Before the locks were held a prune may have merged layers: what was read may be gone.
            again = directory.point(point.id)
            if again == point and _needed(directory, again) == needed:
                yield again
                return
    raise Locked(f"the points below {wanted} of {directory.name} are being pruned; try again")


def _needed(directory: VmDirectory, point: Point) -> list[Path]:
    """Return the directories of all layers of a point, as far as they exist and are readable."""
    waiting = [(point, entry) for entry in point.manifest.disks]
    found = {point.path}
    while waiting:
        _, entry = waiting.pop()
        if entry.parent is None:
            continue
        try:
            below = directory.point_or_retired(entry.parent)
        except BackupctlError:
            continue  # a reader of this disk finds the damage; a reader of another one is not stopped
        found.add(below.path)
        held = below.manifest.disk(entry.name)
        if held is not None:
            waiting.append((below, held))
    return sorted(found)
