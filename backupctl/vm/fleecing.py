# SPDX-License-Identifier: GPL-2.0-or-later
"""Fleecing: a scratch node over the active disk, filled by a backup job before each write of the guest.

::

    guest ──► [active node] ◄── backing ── [tmp: empty qcow2] ◄── NBD export
                    │                          ▲
                    └── blockdev-backup sync=none: old content, before it is overwritten

Source: V. Sementsov-Ogievskiy on the qemu-block list, 26 Dec 2017 and 15 Mar 2022. QEMU serialises the
NBD reads against the copying itself. All disks and all bitmaps change in one transaction.
"""

from collections.abc import Sequence
from pathlib import Path

from backupctl.names import NodeName, Owner
from backupctl.vm import scratch
from backupctl.vm.bitmaps import Action
from backupctl.vm.monitor import Monitor
from backupctl.vm.view import Cut


class Fleecing:
    """The default view; needs QEMU 5.2.

    cuts: the disks and their bitmaps. folder: where the scratch files go. private: folder for named
    scratch files, None where QEMU takes descriptors.
    """

    def __init__(
        self, monitor: Monitor, owner: Owner, cuts: Sequence[Cut], folder: Path, private: Path | None
    ) -> None:
        self._monitor = monitor
        self._owner = owner
        self._cuts = tuple(cuts)
        self._folder = folder
        self._private = private
        self._scratches: list[scratch.Scratch] = []
        self.atomic = True

    def attach(self) -> None:
        """Add the scratch nodes."""
        for number, cut in enumerate(self._cuts):
            node = self._owner.node("tmp", number)
            made = scratch.make(self._monitor, node, cut.disk.size, self._folder, self._private)
            self._scratches.append(made)
            file = {"driver": "file", "filename": made.filename}
            self._monitor.execute(
                "blockdev-add",
                {"driver": "qcow2", "node-name": node, "file": file, "backing": cut.disk.node},
            )

    def cut(self) -> None:
        """One transaction: new bitmaps, old bitmaps disabled, copy-before-write on; for all disks."""
        actions: list[Action] = []
        for number, cut in enumerate(self._cuts):
            actions += cut.bitmap_actions()
            actions.append(self._backup(number, cut))
        self._monitor.transaction(actions)

    def expose(self) -> tuple[NodeName, ...]:
        """Return the scratch nodes: what isn't in one is read from its backing, the active node."""
        return tuple(self._owner.node("tmp", number) for number in range(len(self._cuts)))

    def check(self) -> None:
        """Raise Failed when the scratch folder is filling up: a full one makes GUEST writes fail."""
        scratch.check_left(self._folder)

    def close(self) -> None:
        """Close our descriptors of the scratch files."""
        for made in self._scratches:
            made.close()

    def _backup(self, number: int, cut: Cut) -> Action:
        arguments = {
            "job-id": self._owner.node("job", number),
            "device": cut.disk.node,
            "target": self._owner.node("tmp", number),
            "sync": "none",
        }
        return {"type": "blockdev-backup", "data": arguments}
