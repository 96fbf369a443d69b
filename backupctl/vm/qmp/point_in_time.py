# SPDX-License-Identifier: GPL-2.0-or-later
"""The point-in-time view: what a backup reads while the guest goes on writing.

A view is taken in three parts, around the guest's freeze:

- `prepare`: everything that may take time and changes nothing for the guest;
- `start`: the point in time itself, together with the change of bitmaps;
- `export_nodes`: the nodes that show the disks as they were then.

`teardown.teardown` takes a view down, whichever it is and however far it came.
"""

from dataclasses import dataclass
from typing import Protocol

from backupctl.names import NodeName
from backupctl.vm.disk import Disk
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp.bitmaps import Action


@dataclass(frozen=True)
class ViewDisk:
    """One disk of a view. bitmap_actions: they hand recording over to the new bitmap, in their order."""

    disk: Disk
    bitmap_actions: tuple[Action, ...]


class View(Protocol):
    """A way to have a point-in-time view.

    atomic: whether `start` is one point in time for all disks even if the guest is not frozen.
    """

    atomic: bool

    def prepare(self) -> None:
        """Put in place what the view needs; the guest isn't frozen yet. Raises MonitorError, Failed."""

    def register_guard(self, guard: GuardClient) -> None:
        """Tell the guard what of it could harm the guest, before `start`. Raises GuardLost."""

    def start(self) -> None:
        """Take the point in time of all disks. Raises MonitorError."""

    def export_nodes(self) -> tuple[NodeName, ...]:
        """Return the node to export for each disk, in the disks' order. Raises MonitorError."""

    def check(self) -> None:
        """Raise Failed if the view can't be trusted, or could harm the guest, any longer."""

    def verify_active(self) -> None:
        """Raise Failed unless the view is still in place, so that all that was read is of the point in time.

        Raises MonitorError. To be called after the last byte was read.
        """

    def close(self) -> None:
        """Close what this process has open for the view. Never raises."""


def device_path(qdev: str) -> str:
    """Return the object that has the ``drive`` property.

    `query-block` names virtio's backend (``/machine/peripheral/vda/virtio-backend``); the property is on the
    device itself (``tests/integration/test_known_moment.py``, with snapshot-access, on each QEMU of the lab).
    Other devices are named by their id.
    """
    path = qdev.removesuffix("/virtio-backend")
    return path if path.startswith("/") else f"/machine/peripheral/{path}"
