# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM's directory holds, as `verify` looks at it: points, the layers that they need, digest maps."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.digests.clusters import Records
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound, RepositoryUnreadable
from backupctl.names import DiskName, PointId
from backupctl.repository.chain import Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import ScannedPoints, VmDirectory

_MAX_SCANS = 5


@dataclass(frozen=True)
class Contents:
    """All points of a VM, the retired ones too. unreadable: those whose manifests cannot be read."""

    current: ScannedPoints
    retired: ScannedPoints
    points: Mapping[PointId, Point]
    unreadable: Mapping[PointId, RepositoryUnreadable]

    @classmethod
    def scan(cls, directory: VmDirectory) -> "Contents":
        """Scan a VM's directory, again if a prune seems to have changed it meanwhile."""
        found = directory.scan_points(tolerant=True), directory.retired(tolerant=True)
        for _ in range(_MAX_SCANS):
            again = directory.scan_points(tolerant=True), directory.retired(tolerant=True)
            if [(each.points, [path for path, _ in each.damaged]) for each in again] == [
                (each.points, [path for path, _ in each.damaged]) for each in found
            ]:
                break
            found = again
        current, retired = found
        return cls(
            current,
            retired,
            {point.id: with_valid_entries(point) for point in (*current.points, *retired.points)},
            {PointId(path.name): err for path, err in (*current.unreadable, *retired.unreadable)},
        )

    def all_layers(self) -> list[tuple[Point, DiskEntry]]:
        """Return every layer that a point needs. What a retired one no longer holds up is left to prune."""
        retired, parents = {point.id for point in self.retired.points}, self.parents()
        return [
            (point, entry)
            for point in self.points.values()
            for entry in point.manifest.disks
            if point.id not in retired or (point.id, entry.name) in parents
        ]

    def layers_of(self, point: Point) -> list[tuple[Point, DiskEntry]]:
        """Return the layers that a point needs, as far as they exist."""
        return [layer for entry in point.manifest.disks for layer in self._chain(point, entry)]

    def _chain(self, point: Point, entry: DiskEntry) -> Iterator[tuple[Point, DiskEntry]]:
        at: Point | None = point
        held: DiskEntry | None = entry
        while at is not None and held is not None:
            yield at, held
            at = self.points.get(held.parent) if held.parent else None
            held = at.manifest.disk(entry.name) if at else None

    def parents(self) -> set[tuple[PointId | None, DiskName]]:
        """Return the layers, by point and disk, that another layer is based on."""
        return {
            (entry.parent, entry.name) for point in self.points.values() for entry in point.manifest.disks
        }


class DigestMaps:
    """The digest maps of a VM, each opened once: that checks every byte of it."""

    def __init__(self, stop: Cancellation) -> None:
        self._stop = stop
        self._opened: dict[tuple[PointId, str, str], DigestMap | DamageFound | RepositoryUnreadable] = {}

    def open(self, point: Point, entry: DiskEntry) -> DigestMap | DamageFound | RepositoryUnreadable:
        """Return the digest map of a layer, or why it cannot be read."""
        key = point.id, entry.name, entry.digests
        if key not in self._opened:
            try:
                self._opened[key] = layer_of(point, entry).digests(self._stop.check)
            except (DamageFound, RepositoryUnreadable) as err:
                self._opened[key] = err
        return self._opened[key]

    def records(self, point: Point, entry: DiskEntry) -> Records | None:
        """Return the records of a layer, None if they cannot be read."""
        found = self.open(point, entry)
        return found.records if isinstance(found, DigestMap) else None

    def data_bytes(self, point: Point, entry: DiskEntry) -> int:
        """Return how much data a layer stores, in whole clusters."""
        records = self.records(point, entry)
        data = 0 if records is None else int(np.count_nonzero(~clusters.is_zero(records)))
        return data * clusters.CLUSTER_BYTES


def with_valid_entries(point: Point) -> Point:
    """Return a point in which, of two descriptions that a prune left of a disk, the valid one is chosen."""
    manifest = point.manifest
    for entry in manifest.disks:
        with suppress(DamageFound, RepositoryUnreadable):  # reported when the layer itself is checked
            manifest = manifest.with_disk(Layer.of(point, entry).entry)
    return replace(point, manifest=manifest)


def layer_of(point: Point, entry: DiskEntry) -> Layer:
    """Return the layer that a manifest describes, as it is."""
    return Layer(point.path / f"{entry.name}.qcow2", entry)
