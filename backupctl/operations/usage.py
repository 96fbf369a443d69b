# SPDX-License-Identifier: GPL-2.0-or-later
"""How much the points of a VM store, and what removing some of them would free.

What a file takes is asked of the file system (allocated blocks), so sparse images count as what they take.
What a removal frees is worked out from the digest maps alone: a point that others depend on is merged into
them (`operations/prune`), and what goes is what they hide of it. How QEMU lays out the merged image is not
known beforehand, so that is an estimate, within a few clusters for each layer.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters, digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, RECORD
from backupctl.errors import DamageFound, RepositoryUnreadable
from backupctl.names import DiskName, PointId, VmName
from backupctl.repository.chain import Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory

LayerId = tuple[PointId, DiskName]
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system (stat(2))


@dataclass(frozen=True)
class PointUsage:
    """What one point takes; sizes in bytes.

    dropped: it is no longer a recovery point, but others still need its layers. metadata_bytes: all but the
    images. alone_bytes: about what removing this point alone would free; None if its digest maps, or those
    of what depends on it, are damaged. chain_bytes: what a restore reads: its images and those below; None if
    one of them is missing.
    """

    point: Point
    dropped: bool
    image_bytes: int
    metadata_bytes: int
    alone_bytes: int | None
    chain_bytes: int | None

    @property
    def stored_bytes(self) -> int:
        """All that is in its directory."""
        return self.image_bytes + self.metadata_bytes


@dataclass(frozen=True)
class ChainUsage:
    """All layers of a disk that depend on one full. root: the point of that. stored_bytes: of all layers."""

    disk: DiskName
    root: PointId
    points: tuple[PointId, ...]
    stored_bytes: int


@dataclass(frozen=True)
class VmUsage:
    """What one VM takes. other_bytes: history, lock, unfinished and damaged points."""

    vm: VmName
    path: Path
    points: tuple[PointUsage, ...]
    chains: tuple[ChainUsage, ...]
    other_bytes: int

    @property
    def stored_bytes(self) -> int:
        """All that is in its directory."""
        return self.other_bytes + sum(one.stored_bytes for one in self.points)


def measure(directory: VmDirectory) -> VmUsage:
    """Measure what is stored of a VM. Locks and changes nothing. Raises RepositoryUnreadable."""
    current = directory.scan_points(tolerant=True).points
    retired = directory.retired(tolerant=True).points
    every = sorted((*current, *retired), key=lambda one: one.id)
    layers, needed = _Layers.of(every), chain_bytes(every)
    dropped = {one.id for one in retired}
    found = []
    for point in every:
        total = tree_bytes(point.path)
        images = sum(layers.image_bytes[point.id, entry.name] for entry in point.manifest.disks)
        alone = _or_unknown(layers, point)
        is_dropped = point.id in dropped
        found.append(PointUsage(point, is_dropped, images, total - images, alone, needed[point.id]))
    others = tree_bytes(directory.path) - sum(one.stored_bytes for one in found)
    return VmUsage(directory.name, directory.path, tuple(found), tuple(_chains(every, layers)), others)


def freed_by(directory: VmDirectory, dropped: Collection[PointId]) -> dict[PointId, int] | None:
    """Return about what a prune that drops these points would free, by point; None if maps are damaged.

    Also what it frees of points that were dropped before. What several points depend on is not freed.
    Raises RepositoryUnreadable.
    """
    current, retired = directory.scan_points(tolerant=True).points, directory.retired(tolerant=True).points
    layers = _Layers.of((*current, *retired))
    going = {*dropped, *(one.id for one in retired)}
    try:
        return layers.freed([one for one in (*current, *retired) if one.id in going])
    except DamageFound:
        return None


class DiskOfPoint(Protocol):
    """What is known of a disk, by its manifest or by the summary of a VM."""

    @property
    def name(self) -> DiskName:
        """Its name."""

    @property
    def parent(self) -> PointId | None:
        """The point whose layer is below; None for a full."""

    @property
    def stored_bytes(self) -> int:
        """What its image takes."""


class Stored(Protocol):
    """A point, or the summary of one."""

    @property
    def id(self) -> PointId:
        """Its id."""

    @property
    def disks(self) -> Sequence[DiskOfPoint]:
        """Its disks."""


def chain_bytes(points: Iterable[Stored]) -> dict[PointId, int | None]:
    """Return what a restore of each point reads, by the manifests: its images and all below.

    points: all that there are, retired ones too. None where a layer below is not among them.
    """
    known: dict[DiskName, dict[PointId, int | None]] = defaultdict(dict)
    found: dict[PointId, int | None] = {}
    for point in sorted(points, key=attrgetter("id")):  # parents come first
        total: int | None = 0
        for disk in point.disks:
            layers, parent = known[disk.name], disk.parent
            below = 0 if parent is None else layers.get(parent)
            size = layers[point.id] = None if below is None else below + disk.stored_bytes
            total = None if total is None or size is None else total + size
        found[point.id] = total
    return found


def tree_bytes(path: Path) -> int:
    """Return the allocated bytes of a file, or of a directory and all in it; 0 for what is not there.

    No link is followed. Raises RepositoryUnreadable.
    """
    try:
        found = path.lstat()
        total = found.st_blocks * _BLOCK_BYTES
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(path) as entries:
                total += sum(tree_bytes(Path(entry)) for entry in entries)
    except FileNotFoundError:
        return 0
    except OSError as err:
        raise RepositoryUnreadable(f"cannot read {path}: {err.strerror}") from err
    return total


def _or_unknown(layers: "_Layers", point: Point) -> int | None:
    try:
        return layers.freed_alone(point)
    except DamageFound:
        return None


def _chains(points: Iterable[Point], layers: "_Layers") -> Iterable[ChainUsage]:
    root: dict[LayerId, PointId] = {}
    members: dict[LayerId, list[PointId]] = defaultdict(list)
    for point in points:
        for entry in point.manifest.disks:
            # One whose parent is missing is the root of what depends on it.
            first = root.get((entry.parent, entry.name), point.id) if entry.parent else point.id
            root[point.id, entry.name] = first
            members[first, entry.name].append(point.id)
    for (first, disk), held in sorted(members.items()):
        stored = sum(layers.bytes_of((point, disk)) for point in held)
        yield ChainUsage(disk, first, tuple(held), stored)


@dataclass
class _Clusters:
    """Which clusters a layer describes, and which of them hold data: a flag for each cluster of the disk."""

    described: NDArray[np.bool_]
    data: NDArray[np.bool_]

    @classmethod
    def of(cls, layer: Layer) -> "_Clusters":
        """Read a digest map. Raises DamageFound, RepositoryUnreadable."""
        records = layer.digests().records
        described = np.zeros(clusters.count(layer.entry.size), np.bool_)
        data = described.copy()
        described[records["cluster"]] = True
        data[records["cluster"]] = ~clusters.is_zero(records)
        return cls(described, data)

    def hidden_by(self, upper: "_Clusters") -> tuple[int, int]:
        """Return how many of its clusters a layer above describes too, and how many of those hold data."""
        shared = min(len(self.data), len(upper.data))
        hidden = self.described[:shared] & upper.described[:shared]
        # Beyond the end of the upper layer nothing of this one is left.
        cut = self.data[shared:]
        return int(hidden.sum()), int((self.data[:shared] & hidden).sum() + cut.sum())

    def under(self, upper: "_Clusters") -> "_Clusters":
        """Return what both merged into one are."""
        described, data = upper.described.copy(), upper.data.copy()
        shared = min(len(data), len(self.data))
        shown = self.described[:shared] & ~upper.described[:shared]
        described[:shared] |= shown
        data[:shared] |= shown & self.data[:shared]
        return _Clusters(described, data)


@dataclass
class _Layers:
    """All layers of a VM, with what they take and what depends on what; merging changes it."""

    points: dict[PointId, Point]
    image_bytes: dict[LayerId, int]
    map_bytes: dict[LayerId, int]
    parent: dict[LayerId, LayerId | None]
    above: dict[LayerId, set[LayerId]]
    merged: dict[LayerId, _Clusters] = field(default_factory=dict)

    @classmethod
    def of(cls, points: Iterable[Point]) -> "_Layers":
        """Take the sizes of all layers. Raises RepositoryUnreadable."""
        found = cls({}, {}, {}, {}, defaultdict(set))
        for point in points:
            found.points[point.id] = point
            for entry in point.manifest.disks:
                found._add(point, entry)
        return found

    def _add(self, point: Point, entry: DiskEntry) -> None:
        key, image = (point.id, entry.name), point.path / f"{entry.name}.qcow2"
        self.image_bytes[key] = tree_bytes(image)
        self.map_bytes[key] = tree_bytes(digest_map.path_of(image))
        self.parent[key] = (entry.parent, entry.name) if entry.parent else None
        if below := self.parent[key]:
            self.above[below].add(key)

    def bytes_of(self, key: LayerId) -> int:
        """Return what image and digest map take."""
        return self.image_bytes[key] + self.map_bytes[key]

    def freed_alone(self, point: Point) -> int:
        """Return about what removing one point frees. Raises DamageFound, RepositoryUnreadable."""
        keys = [(point.id, entry.name) for entry in point.manifest.disks]
        freed = 0
        for key in keys:
            above = self.above[key]
            if not above:
                freed += self.bytes_of(key)
            elif len(above) == 1:
                freed += self._hidden_bytes(key, next(iter(above)))
        stays = any(len(self.above[key]) > 1 for key in keys)
        return freed if stays else freed + self._rest(point)

    def freed(self, going: Iterable[Point]) -> dict[PointId, int]:
        """Drop points as a prune does, and return what it frees, by point. Raises DamageFound."""
        left = {point.id: {entry.name for entry in point.manifest.disks} for point in going}
        freed = dict.fromkeys(left, 0)
        progress = True
        while progress:
            progress = False
            for point in sorted(left):
                keys = [(point, disk) for disk in left[point]]
                if not any(self.above[key] for key in keys):
                    freed[point] += sum(map(self._remove, keys)) + self._rest(self.points[point])
                    del left[point]
                    progress = True
            for point in sorted(left):
                for key in [(point, disk) for disk in left[point] if len(self.above[point, disk]) == 1]:
                    freed[point] += self._merge(key)
                    left[point].discard(key[1])
                    progress = True
        return freed

    def _rest(self, point: Point) -> int:
        """Return what a point takes beside its layers."""
        names = (entry.name for entry in point.manifest.disks)
        files = (point.path / f"{name}{end}" for name in names for end in (".qcow2", ".digests"))
        return tree_bytes(point.path) - sum(map(tree_bytes, files))

    def _remove(self, key: LayerId) -> int:
        if below := self.parent[key]:
            self.above[below].discard(key)
        return self.bytes_of(key)

    def _merge(self, key: LayerId) -> int:
        """Merge a layer into the only one above it, and return what that frees."""
        (upper,) = self.above[key]
        freed = self._hidden_bytes(key, upper)
        total = self.bytes_of(key) + self.bytes_of(upper) - freed
        self.merged[upper] = self._clusters(key).under(self._clusters(upper))
        self.merged.pop(key, None)
        self.image_bytes[upper], self.map_bytes[upper] = max(total, 0), 0
        below = self.parent[upper] = self.parent[key]
        if below is not None:
            self.above[below].discard(key)
            self.above[below].add(upper)
        self.above[key].clear()
        return freed

    def _hidden_bytes(self, key: LayerId, upper: LayerId) -> int:
        hidden, data = self._clusters(key).hidden_by(self._clusters(upper))
        # Of the two images, the tables of one go as well; of the two maps, the records that are doubled.
        tables = self.image_bytes[upper] - self._clusters(upper).data.sum() * CLUSTER_BYTES
        return int(data * CLUSTER_BYTES + hidden * RECORD.itemsize + max(tables, 0))

    def _clusters(self, key: LayerId) -> _Clusters:
        if found := self.merged.get(key):
            return found
        point, disk = self.points[key[0]], key[1]
        entry = point.manifest.disk(disk)
        assert entry is not None
        return _Clusters.of(Layer.of(point, entry))
