# SPDX-License-Identifier: GPL-2.0-or-later
"""One backup of a domain that is off: that of any VM that is off, with checkpoints for bitmaps."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from backupctl.names import BitmapName, VmName
from backupctl.vm.driver import DiskSnapshot, PointFacts
from backupctl.vm.libvirt import checkpoints, off_checkpoints, off_recovery, xml
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.off_images import OffDisks
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.offline.session import OfflineSession
from backupctl.vm.qmp import bitmaps, teardown


@dataclass(frozen=True)
class Off:
    """A domain that is off: its libvirt, its images, and the daemon that has them open.

    connect: makes a new connection to the domain. Raises MonitorUnreachable.
    """

    connect: Callable[[], Connection]
    connection: Connection
    disks: OffDisks
    daemon: Daemon


class OffSession(OfflineSession):
    """See `vm.driver.Session`."""

    def __init__(self, name: VmName, off: Off) -> None:
        super().__init__(name, off.daemon)
        self._off = off

    def differential_bitmap(self, one: DiskSnapshot, name: BitmapName) -> list[bitmaps.Action]:
        """Unite the bitmaps of one checkpoint: each records for as long as it exists."""
        if not one.bases:
            return []
        images = off_checkpoints.layers(self._off.daemon, self._off.disks)
        base = checkpoints.checkpoint_of(one.bases[0], one.disk.name)
        return off_checkpoints.differential_bitmap(images[self._off.disks.target(one.disk.name)], base, name)

    def hand_over(self, disks: Sequence[DiskSnapshot], facts: PointFacts) -> None:  # noqa: ARG002 - the names tell
        """Make the checkpoint of this point; those before it stay until the point is committed."""
        recorded = [one for one in disks if one.disk.persistent]
        if not recorded:
            return
        name = checkpoints.checkpoint_of(recorded[0].new, recorded[0].disk.name)
        # libvirt first: a bitmap that it does not know of would record, and nobody would ever remove it.
        checkpoints.redefine(self._off.connection, self._described(name, recorded))
        off_checkpoints.make(self._off.daemon, recorded, name)

    def recover(self, facts: PointFacts, clients: teardown.Clients) -> list[str]:
        """See `off_recovery.resolve`. A connection to libvirt that broke is made anew."""
        off = self._off
        with ExitStack() as fresh:
            connection = off.connection
            if not connection.alive:
                connection = fresh.enter_context(off.connect())
            return off_recovery.resolve(connection, off.daemon, off.disks, facts, clients)

    def _described(self, name: str, disks: Sequence[DiskSnapshot]) -> str:
        there = checkpoints.listed(self._off.connection, off=True)
        described = [self._off.disks.described[one.disk.name] for one in disks]
        targets = [one.target for one in described]
        others = [one.target for one in self._off.disks.described.values() if one.target not in targets]
        return xml.checkpoint(
            name,
            checkpoints.description({one.target: one.files for one in described}),
            targets,
            [*others, *(target for target, _ in self._off.disks.skipped)],
            xml.Noted(int(time.time()), there[-1].name if there else ""),
        )
