# SPDX-License-Identifier: GPL-2.0-or-later
"""What changed between two points, from their digest maps alone: no data is read.

The points need not be of one chain.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.errors import UsageError
from backupctl.names import DiskName, PointId, VmName
from backupctl.repository import chain, read_locks
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.sizes import WINDOW_CLUSTERS


@dataclass(frozen=True, eq=False)
class DiskDiff:
    """One disk that both points hold. changed: one flag for each cluster of the larger disk.

    size_before, size_after: virtual, in bytes. What only one of them has counts as changed.
    """

    name: DiskName
    size_before: int
    size_after: int
    changed: NDArray[np.bool_]

    @property
    def size(self) -> int:
        """The larger of the sizes."""
        return max(self.size_before, self.size_after)

    @property
    def changed_bytes(self) -> int:
        """Return how much changed, in whole clusters; the last of the disk may be short."""
        found = int(np.count_nonzero(self.changed)) * CLUSTER_BYTES
        short = len(self.changed) * CLUSTER_BYTES - self.size
        return found - short if len(self.changed) and self.changed[-1] else found

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of what changed, in order, neighbours joined."""
        edges = np.flatnonzero(np.diff(self.changed, prepend=False, append=False))
        for first, stop in edges.reshape(-1, 2):
            offset = int(first) * CLUSTER_BYTES
            yield offset, min(int(stop) * CLUSTER_BYTES, self.size) - offset


@dataclass(frozen=True)
class DiffReport:
    """What changed from one point to another. only_before, only_after: disks that just one of them holds."""

    vm: VmName
    before: PointId
    after: PointId
    disks: tuple[DiskDiff, ...]
    only_before: tuple[DiskName, ...]
    only_after: tuple[DiskName, ...]


def diff(
    directory: VmDirectory, before: Point, after: Point, *, disk: str | None, stop: Cancellation
) -> DiffReport:
    """Compare two points, or one disk of them. Raises NoSuchPoint, UsageError, DamageFound, Interrupted."""
    with read_locks.reading(directory, before.id) as first, read_locks.reading(directory, after.id) as second:
        return _diff(directory, first, second, disk, stop)


def _diff(
    directory: VmDirectory, before: Point, after: Point, disk: str | None, stop: Cancellation
) -> DiffReport:
    held = [[entry.name for entry in point.manifest.disks] for point in (before, after)]
    if disk is not None:
        for point, names in zip((before, after), held, strict=True):
            if disk not in names:
                raise chain.no_such_disk(point, disk)
        held = [[DiskName(disk)], [DiskName(disk)]]
    shared = [name for name in held[0] if name in held[1]]
    if not shared:
        raise UsageError(f"{before.id} and {after.id} have no disk in common")
    return DiffReport(
        directory.name,
        before.id,
        after.id,
        tuple(_compare(directory, before, after, name, stop) for name in shared),
        tuple(name for name in held[0] if name not in shared),
        tuple(name for name in held[1] if name not in shared),
    )


def _compare(
    directory: VmDirectory, before: Point, after: Point, name: DiskName, stop: Cancellation
) -> DiskDiff:
    old, new = _content(directory, before, name), _content(directory, after, name)
    smaller, larger = sorted((old.size_bytes, new.size_bytes))
    changed = np.zeros(clusters.count(larger), np.bool_)
    for first in range(0, len(changed), WINDOW_CLUSTERS):
        stop.check()
        part = changed[first : first + WINDOW_CLUSTERS]
        part[:] = clusters.differ(old.window(first, len(part)), new.window(first, len(part)))
    if smaller < larger:
        changed[smaller // CLUSTER_BYTES :] = True
    return DiskDiff(name, old.size_bytes, new.size_bytes, changed)


def _content(directory: VmDirectory, point: Point, name: DiskName) -> EffectiveContent:
    layers = chain.layers(directory, point, name)
    return chain.effective_content(layers, layers[0].entry.size)
