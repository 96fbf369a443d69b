# SPDX-License-Identifier: GPL-2.0-or-later
"""The point-in-time view: what a backup reads while the guest goes on writing.

A view is taken in three parts, around the guest's freeze:

- `attach`: everything that may take time and changes nothing for the guest;
- `cut`: the moment itself, together with the change of bitmaps;
- `expose`: the nodes that show the disks as they were at that moment.

`teardown.teardown` takes a view down, whichever it is and however far it came.
"""

from dataclasses import dataclass
from typing import Protocol

from backupctl.names import BitmapName, NodeName
from backupctl.vm.disk import Disk
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp import bitmaps


@dataclass(frozen=True)
class DiskSnapshot:
    """One disk's part of the moment.

    new: the bitmap that records from the moment on. bases: those that recorded up to it, oldest first;
    none for a full, which leaves the old chain's bitmap as it is, and for a scan. gapped: those of ours
    that can't be used (see `bitmaps.gapped`), removed at the moment.
    """

    disk: Disk
    new: BitmapName
    bases: tuple[BitmapName, ...] = ()
    gapped: tuple[BitmapName, ...] = ()

    def bitmap_actions(self) -> list[bitmaps.Action]:
        """Actions of the transaction that hand recording over from `bases` to `new`."""
        return bitmaps.handover_actions(
            self.disk.node, self.new, self.bases, persistent=self.disk.persistent, gapped=self.gapped
        )


class View(Protocol):
    """A way to have a point-in-time view.

    atomic: whether `cut` is one moment for all disks even if the guest is not frozen.
    """

    atomic: bool

    def prepare(self) -> None:
        """Put in place what the view needs; the guest isn't frozen yet. Raises MonitorError, Failed."""

    def register_guard(self, guard: GuardClient) -> None:
        """Tell the guard what of it could harm the guest, before `cut`. Raises GuardLost."""

    def cut(self) -> None:
        """Take the moment of all disks at once. Raises MonitorError."""

    def export_nodes(self) -> tuple[NodeName, ...]:
        """Return the node to export for each disk, in the disks' order. Raises MonitorError."""

    def check(self) -> None:
        """Raise Failed if the view can't be trusted, or could harm the guest, any longer."""

    def verify_active(self) -> None:
        """Raise Failed unless the view stands yet, so that all that was read of it is of the moment.

        Raises MonitorError. To be called when the last byte was read.
        """

    def close(self) -> None:
        """Let go of what this process holds for the view. Never raises."""


def device_path(qdev: str) -> str:
    """Return the object that has the ``drive`` property.

    `query-block` names virtio's backend (``/machine/peripheral/vda/virtio-backend``); the property sits
    on the device itself (measured). Other devices are named by their id.
    """
    path = qdev.removesuffix("/virtio-backend")
    return path if path.startswith("/") else f"/machine/peripheral/{path}"
