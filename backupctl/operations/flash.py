# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks of a point are flash chips of the machine: UEFI variables, which no guest has as a disk."""

from backupctl.repository import stored_files
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.vm import definition


def disks(point: Point) -> tuple[DiskEntry, ...]:
    """Return them; none if the point does not tell. Raises DamageFound, RepositoryError."""
    told = stored_files.first(point.manifest.definition, "qemu")
    if told is None:
        return ()
    nodes = definition.flash_nodes(stored_files.read(point.path, told))
    return tuple(one for one in point.manifest.disks if one.node in nodes)
