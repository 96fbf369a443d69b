# SPDX-License-Identifier: GPL-2.0-or-later
"""The point-in-time view: what a backup reads while the guest goes on writing.

A view is taken in three parts, around the guest's freeze:

- `attach`: everything that may take time and changes nothing for the guest;
- `cut`: the moment itself, together with the change of bitmaps;
- `exported`: the nodes that show the disks as they were at that moment.

`cleanup.dismantle` takes a view down, whichever it is and however far it came.
"""

from dataclasses import dataclass
from typing import Protocol

from backupctl.names import BitmapName, NodeName
from backupctl.vm import bitmaps
from backupctl.vm.disks import Disk


@dataclass(frozen=True)
class Cut:
    """One disk's part of the moment.

    new: the bitmap that records from the moment on. base: the one that recorded up to it; None for a
    full, which leaves the old chain's bitmap as it is.
    """

    disk: Disk
    new: BitmapName
    base: BitmapName | None

    def bitmap_actions(self) -> list[bitmaps.Action]:
        """Actions of the transaction that hand recording over from `base` to `new`."""
        return bitmaps.begin(self.disk.node, self.new, self.base, persistent=self.disk.persistent)


class View(Protocol):
    """A way to have a point-in-time view."""

    def attach(self) -> None:
        """Put in place what the view needs; the guest isn't frozen yet. Raises MonitorError, Failed."""

    def cut(self) -> None:
        """Take the moment of all disks at once. Raises MonitorError."""

    def exported(self) -> tuple[NodeName, ...]:
        """Return the node to export for each disk, in the disks' order."""

    def check(self) -> None:
        """Raise Failed if the view can't be trusted, or could harm the guest, any longer."""

    def close(self) -> None:
        """Let go of what this process holds for the view. Never raises."""
