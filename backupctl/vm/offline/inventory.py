# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of a VM that is off: those whose images are named, under the names that they are stored under."""

from collections.abc import Iterable
from dataclasses import replace

from backupctl.vm.bitmap import Bitmap
from backupctl.vm.disk import Inventory
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.qmp import inventory


def of_images(daemon: Daemon) -> Inventory:
    """List the disks. Raises MonitorError, Refused."""
    images = {one.node: one for one in daemon.disks}
    found = inventory.of_nodes(daemon.monitor, {node: one.disk for node, one in images.items()})
    disks = [
        replace(disk, filename=str(images[disk.node].path), bitmaps=tuple(changeable(disk.bitmaps)))
        for disk in found.disks
    ]
    return replace(found, disks=tuple(disks))


def changeable(found: Iterable[Bitmap]) -> Iterable[Bitmap]:
    """Yield bitmaps of newest images as a run sees them, which opens those for writing when it must."""
    return (replace(one, read_only=False) for one in found)
