# SPDX-License-Identifier: GPL-2.0-or-later
"""The chains that a run builds on: each followed and checked once, though several steps ask about it.

The caller holds the VM's lock, so that no prune changes them meanwhile. What was checked is kept: the layers,
and the records of their digest maps until the disk is copied.
"""

from collections.abc import Sequence

from backupctl.digests.clusters import EffectiveContent
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound
from backupctl.names import DiskName, PointId
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.repository.vm_directory import AllPoints, VmDirectory

_MOST_MAPPED = 256
"""How many files stay open; the maps of a chain that needs more are opened again. Small maps need none."""


class CheckedChains:
    """The chains of a VM's disks. points: those that are known already.

    A chain is named by its newest point and the disk; no point is the empty chain below a full.
    """

    def __init__(self, directory: VmDirectory, points: AllPoints | None = None) -> None:
        self.directory = directory
        known = (*points.committed.points, *points.retired.points) if points else ()
        self._points = {point.id: point for point in known}
        self._layers: dict[tuple[PointId, DiskName], tuple[Layer, ...]] = {}
        self._maps: dict[tuple[PointId, DiskName], Sequence[DigestMap]] = {}
        self._mapped = 0

    def layers(self, point: PointId | None, disk: DiskName) -> tuple[Layer, ...]:
        """Return a chain's layers, newest first. Raises DamageFound, RepositoryError."""
        if point is None:
            return ()
        key = point, disk
        if key not in self._layers:
            self._layers[key] = chain.below(self.directory, point, disk, self._points)
        return self._layers[key]

    def content(self, point: PointId | None, disk: DiskName, size: int) -> EffectiveContent:
        """Return what a disk of `size` bytes holds by its chain; forget the maps. Raises as `layers`."""
        layers = self.layers(point, disk)
        maps = self._maps.pop((point, disk), None) if point else None
        if maps is None:
            return chain.effective_content(layers, size)
        self._mapped -= _count_mapped(maps)
        return EffectiveContent(
            [(one.records, layer.entry.size) for one, layer in zip(maps, layers, strict=True)], size
        )

    def error(self, point: PointId, disk: DiskName) -> str | None:
        """Return the damage of a chain, on which nothing can be built; None if there is none.

        Raises RepositoryUnreadable.
        """
        # RepositoryUnreadable passes: as damage it would cost a full backup each time that a disk or network
        # fails.
        try:
            maps = [layer.digests() for layer in self.layers(point, disk)]
        except DamageFound as err:
            return err.message
        mapped = _count_mapped(maps)
        if (point, disk) not in self._maps and self._mapped + mapped <= _MOST_MAPPED:
            self._maps[point, disk] = maps
            self._mapped += mapped
        return None

    def too_long(self, most: int, point: PointId, disk: DiskName) -> str | None:
        """Return why a chain may get no more layers; None if it may. Raises as `layers`."""
        found = len(self.layers(point, disk))
        return f"its chain has {found} layers, as many as --max-chain allows" if found >= most else None


def _count_mapped(maps: Sequence[DigestMap]) -> int:
    return sum(one.mapped for one in maps)
