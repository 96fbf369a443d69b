# SPDX-License-Identifier: GPL-2.0-or-later
"""The chains of layers that a summary tells of.

Each parent must be older. A summary that said otherwise would be followed without end.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from backupctl.names import DiskName, PointId
from backupctl.repository.summary_file import DiskSummary, PointSummary


def below(
    points: Mapping[PointId, PointSummary], disk: DiskName, parent: PointId | None
) -> Iterator[tuple[PointId, DiskSummary | None]]:
    """Yield the layers of a chain from `parent` to the oldest, each with what its point says of it.

    None: it is not among these points, or no chain can have it. It is the last one then.
    """
    while parent is not None:
        held = _held(points, parent, disk)
        yield parent, held
        parent = held.parent if held else None


@dataclass(frozen=True)
class Chains:
    """What is below what, among all points of a VM. lengths: of the chains that were counted."""

    points: Mapping[PointId, PointSummary]
    lengths: dict[tuple[PointId, DiskName], int | None] = field(default_factory=dict)

    def most_layers(self, point: PointSummary) -> int | None:
        """Count the layers of the longest chain of a point; None if one of them is missing."""
        counts = [self._layers(point.id, disk.name) for disk in point.disks]
        known = [one for one in counts if one is not None]
        return max(known, default=None) if len(known) == len(counts) else None

    def bytes_of(self, point: PointId, disk: DiskName) -> int | None:
        """Return the lengths of all images that a disk consists of at a point; None if one is missing."""
        total = 0
        for _, held in below(self.points, disk, point):
            if held is None:
                return None
            total += held.file_bytes
        return total

    def _layers(self, point: PointId, disk: DiskName) -> int | None:
        above: list[PointId] = []
        while (point, disk) not in self.lengths:
            held = _held(self.points, point, disk)
            if held is None or held.parent is None:
                self.lengths[point, disk] = None if held is None else 1
                break
            above.append(point)
            point = held.parent
        count = self.lengths[point, disk]
        for one in reversed(above):
            count = self.lengths[one, disk] = None if count is None else count + 1
        return count


def _held(points: Mapping[PointId, PointSummary], point: PointId, disk: DiskName) -> DiskSummary | None:
    """Return a disk of a point; None if there is none, or one that no chain can have."""
    found = points.get(point)
    held = found.disk(disk) if found else None
    return None if held is None or (held.parent is not None and held.parent >= point) else held
