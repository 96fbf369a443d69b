# SPDX-License-Identifier: GPL-2.0-or-later
"""What must not have changed between the inventory and the point in time: node, size, bitmap."""

from collections.abc import Iterable, Mapping

from backupctl.errors import Failed, MonitorError
from backupctl.names import BitmapName, NodeName
from backupctl.vm.disk import Disk
from backupctl.vm.qmp import inventory
from backupctl.vm.qmp.monitor import Monitor


def refuse_moved(monitor: Monitor, disks: Iterable[Disk]) -> None:
    """Raise Failed if a device writes to another node than when it was listed: a snapshot came between.

    To be called while no view or job stands over the disks. Raises MonitorError too.
    """
    by_device = inventory.root_nodes(monitor)
    for disk in disks:
        if disk.qdev and (top := by_device.get(disk.qdev)) != disk.node:
            raise Failed(
                f"{disk.name} writes to {top or 'nothing'} now, not to {disk.node}: an external snapshot was "
                "taken while the run began, or its medium was changed"
            )


def refuse_resized(monitor: Monitor, disks: Iterable[Disk]) -> None:
    """Raise Failed if a disk has another size than when it was listed. Raises MonitorError if it is gone.

    From the point in time on QEMU refuses a resize; one just before it would cut the view short.
    """
    nodes = inventory.named_nodes(monitor)
    for disk in disks:
        try:
            size = nodes[disk.node]["image"]["virtual-size"]
        except (KeyError, TypeError) as err:
            raise MonitorError(f"the node {disk.node} of {disk.name} has gone") from err
        if size != disk.size:
            raise Failed(f"{disk.name} was resized while the run began")


def refuse_disabled(monitor: Monitor, recording: Mapping[NodeName, BitmapName]) -> None:
    """Raise Failed if a bitmap, by its node, has stopped to record since it was listed.

    The transaction disables it all the same, and nobody could tell afterwards. Raises MonitorError.
    """
    nodes = inventory.named_nodes(monitor)
    for node, name in recording.items():
        found = {bitmap.name: bitmap for bitmap in inventory.bitmaps_of(node, nodes.get(node, {}))}
        if name not in found or not found[name].recording:
            raise Failed(f"somebody removed or disabled the bitmap {name} of {node} while the run began")
