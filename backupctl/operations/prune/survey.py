# SPDX-License-Identifier: GPL-2.0-or-later
"""The points of a VM while it is pruned: which there are, and what is based on what.

A prune releases the VM's lock after each step, so others may change the directory in between; and each step
changes it. To read every manifest again after each step would make a prune of thousands of points quadratic.
"""

from collections import defaultdict
from collections.abc import Iterable

from backupctl.errors import UNTOUCHED, DamageFound, NoSuchPoint, UnknownFormat
from backupctl.names import DiskName, PointId
from backupctl.repository import history, markers
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory


class Survey:
    """All points of a VM, retired or not, as they were when `update` was called last."""

    def __init__(self, directory: VmDirectory) -> None:
        self._directory = directory
        self._points: dict[PointId, Point] = {}
        self._retired: set[PointId] = set()
        self._merged: set[PointId] = set()
        self._above: dict[tuple[PointId, str], set[PointId]] = defaultdict(set)
        self._built_on: dict[PointId, set[PointId]] = defaultdict(set)
        self._history_end = 0

    def update(self) -> None:
        """Read what has changed. Raises DamageFound if a manifest cannot be used, RepositoryError.

        The caller holds the VM's lock, unless it calls this only once.
        """
        # All that a step decides on is in here, or is looked at again when it acts (markers, images). It is
        # still true: directories come and go by their names, all of which are looked at; and whoever retires
        # a point or replaces its manifest has the VM's lock, and writes a line into the history.
        names = set(self._directory.all_points())
        changed = history.points_since(self._directory.path, self._history_end) if self._points else None
        self._history_end = history.end(self._directory.path)
        for point in self._points.keys() - names if changed is not None else list(self._points):
            self._forget(point)
        for point in names & changed if changed is not None else ():
            self._forget(point)
        for point in sorted(names - self._points.keys()):
            self._read(point)

    def swaps(self) -> list[tuple[Point, DiskEntry]]:
        """Return the disks with two descriptions, whose images are to be exchanged, oldest point first."""
        points = self._sorted(self._merged)
        return [(point, entry) for point in points for entry in point.manifest.disks if entry.merged]

    def current(self) -> list[Point]:
        """Return the recovery points, oldest first."""
        return self._sorted(self._points.keys() - self._retired)

    def retired(self) -> list[Point]:
        """Return the points that were dropped, oldest first."""
        return self._sorted(self._retired)

    def is_needed(self, point: Point) -> bool:
        """Whether any layer is based on one of a point."""
        return any(self._above.get((point.id, entry.name)) for entry in point.manifest.disks)

    def above(self, point: PointId, disk: DiskName) -> list[Point]:
        """Return the points whose layers are based on a layer, oldest first."""
        return self._sorted(self._above.get((point, disk), ()))

    def built_on(self, point: PointId) -> list[Point]:
        """Return the points whose manifests name a point as their parent, oldest first."""
        return self._sorted(self._built_on.get(point, ()))

    def _sorted(self, points: Iterable[PointId]) -> list[Point]:
        return [self._points[point] for point in sorted(points)]

    def _read(self, wanted: PointId) -> None:
        try:
            point = self._directory.point_or_retired(wanted)
            retired = markers.has(point.path, markers.RETIRED)
        except NoSuchPoint:
            return  # somebody has just removed it
        except (DamageFound, UnknownFormat) as err:
            raise DamageFound(
                f"{err.message}; nothing is pruned while it is not known what {wanted} is based on",
                state=UNTOUCHED,
                next_command=f"backupctl verify {self._directory.name}",
            ) from err
        self._points[wanted] = point
        if retired:
            self._retired.add(wanted)
        for entry in point.manifest.disks:
            if entry.merged:
                self._merged.add(wanted)
            for parent in _parents(entry):
                self._above[parent, entry.name].add(wanted)
        if point.manifest.parent:
            self._built_on[point.manifest.parent].add(wanted)

    def _forget(self, point: PointId) -> None:
        manifest = self._points.pop(point).manifest
        self._retired.discard(point)
        self._merged.discard(point)
        for entry in manifest.disks:
            for parent in _parents(entry):
                self._above[parent, entry.name].discard(point)
        if manifest.parent:
            self._built_on[manifest.parent].discard(point)


def _parents(entry: DiskEntry) -> list[PointId]:
    """Return the points on which a layer is based, by any description of it."""
    # Also by the one that is not valid any more: a reader locks every point that its manifest leads to, and
    # would miss one that was removed.
    return [parent for parent in (entry.parent, entry.after_merge().parent) if parent]
