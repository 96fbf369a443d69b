# SPDX-License-Identifier: GPL-2.0-or-later
"""Which points read a damaged range: all that are based on its layer, where no newer layer masks it.

::

    newest   ....NN..........    reads  NN, and of the damage what is not below NN
    middle   ................    reads  all of the damage
    damaged  ...XXX..........
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters
from backupctl.digests.clusters import Records
from backupctl.names import DiskName, PointId
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.sizes import Range


@dataclass(frozen=True)
class Affected:
    """The part of a point's disk that reads damaged data."""

    point: PointId
    disk: DiskName
    ranges: tuple[Range, ...]


class Impact:
    """The layers of a VM, and which is based on which.

    records: returns the records of a layer, None if they cannot be read; then it counts as masking nothing.
    retired: those of `points` that are no longer recovery points; only what is based on them is affected.
    """

    def __init__(
        self,
        points: Iterable[Point],
        records: Callable[[Point, DiskEntry], Records | None],
        retired: Collection[PointId] = (),
    ) -> None:
        self._records = records
        self._retired = retired
        self._layers: dict[tuple[PointId, str], tuple[Point, DiskEntry]] = {}
        self._children: dict[tuple[PointId, str], list[PointId]] = defaultdict(list)
        for point in points:
            for entry in point.manifest.disks:
                self._layers[point.id, entry.name] = point, entry
                if entry.parent is not None:
                    self._children[entry.parent, entry.name].append(point.id)

    def based_on(self, point: PointId) -> tuple[Affected, ...]:
        """Return what is based on a point whose manifest cannot be used."""
        found: list[Affected] = []
        for parent, disk in list(self._children):
            if parent == point:
                for child in self._children[parent, disk]:
                    found += self.affected_by_layer(child, disk)
        return tuple(sorted(found, key=lambda one: (one.point, one.disk)))

    def affected_by_layer(self, point: PointId, disk: str) -> tuple[Affected, ...]:
        """Return what is affected when a layer cannot be opened: all of each disk that needs it."""
        return self._walk(point, disk, None)

    def affected_by_clusters(self, point: PointId, disk: str, damaged: NDArray[Any]) -> tuple[Affected, ...]:
        """Return what is affected when some clusters of a layer are damaged."""
        return self._walk(point, disk, damaged)

    def _walk(self, point: PointId, disk: str, damaged: NDArray[Any] | None) -> tuple[Affected, ...]:
        found = []
        waiting = [(point, damaged)]
        while waiting:
            at, seen = waiting.pop()
            layer, entry = self._layers[at, disk]
            if seen is not None and at != point:
                seen = self._through(layer, entry, seen)
            shown = ((0, entry.size),) if seen is None else clusters.ranges(seen, entry.size)
            if shown:
                if layer.id not in self._retired:
                    found.append(Affected(layer.id, entry.name, tuple(shown)))
                waiting += [(child, seen) for child in self._children[at, disk]]
        return tuple(sorted(found, key=lambda one: one.point))

    def _through(self, point: Point, entry: DiskEntry, below: NDArray[Any]) -> NDArray[Any]:
        """Return which of the clusters below a layer it does not mask."""
        records = self._records(point, entry)
        seen = below[below < clusters.count(entry.size)]
        return seen if records is None else np.setdiff1d(seen, records["cluster"], assume_unique=True)
