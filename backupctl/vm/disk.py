# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's disks, whatever tells of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from backupctl import sizes
from backupctl.errors import UNTOUCHED, Refused, UsageError
from backupctl.names import DiskName, NodeName
from backupctl.vm.bitmap import Bitmap

MAX_SIZE = sizes.MAX_SIZE
"""No disk is larger (bytes); a manifest would not take it."""


@dataclass(frozen=True)
class Disk:
    """One writable disk.

    name: what it is stored under. node: the active node. size: bytes. driver: of the active node.
    persistent: whether its bitmaps survive a restart of QEMU (qcow2 version 3 only).
    qdev: the device as `query-block` names it (see `point_in_time.device_path`), "" without one.
    filename: of the active node. apart: whether its data lie in another file than its bitmaps would
    (a qcow2 with a data file). encrypted: whether QEMU encrypts it; a backup holds what the guest sees.
    shared: whether several devices write to it. open_to_others: whether it may be written to past this QEMU's
    bitmaps, by another VM. firmware: whether it holds UEFI variables. held_bytes: how
    much of it is more than empty, as far as that is known; at most `size`, which is also what is not known.
    """

    name: DiskName
    node: NodeName
    size: int
    driver: str
    persistent: bool
    qdev: str
    filename: str
    bitmaps: tuple[Bitmap, ...]
    apart: bool = False
    encrypted: bool = False
    shared: bool = False
    open_to_others: bool = False
    firmware: bool = False
    held_bytes: int = MAX_SIZE

    def trusts(self, bitmap: Bitmap) -> bool:
        """Whether a bitmap can only be of the data that the disk has now.

        One that was stored in a file says what changed in the data that it was stored with. Where those lie
        in a file of their own, they may have been exchanged while no QEMU looked. QEMU stores a persistent
        bitmap alone, so one that is none was made since this QEMU began.
        """
        return not (self.apart and bitmap.persistent)


@dataclass(frozen=True)
class Inventory:
    """All that is known of a VM's disks.

    skipped: names of media that cannot be backed up, with the reason. busy: those on which somebody else
    works, with who that is. foreign_node_bitmaps: bitmaps on nodes that are not a disk's active node.
    """

    disks: tuple[Disk, ...]
    skipped: tuple[tuple[str, str], ...]
    busy: tuple[tuple[str, str], ...]
    foreign_node_bitmaps: tuple[Bitmap, ...]

    def refuse_busy(self) -> None:
        """Raise Refused if somebody else works on a disk."""
        for _, who in self.busy:
            raise Refused(who, state=UNTOUCHED)

    def chosen(self, names: Iterable[str]) -> tuple[Disk, ...]:
        """Return the disks of these names, all if there are none. Raises UsageError for an unknown one."""
        wanted = tuple(dict.fromkeys(names))
        known = {disk.name: disk for disk in self.disks}
        for name in wanted:
            if name not in known:
                reasons = {left: f"{left} is left out: {why}" for left, why in self.skipped}
                there = ", ".join(known) or "none"
                raise UsageError(
                    reasons.get(name, f"the VM has no disk {name!r:.120}; its writable disks: {there}"),
                    state=UNTOUCHED,
                )
        return tuple(known[DiskName(name)] for name in wanted) if wanted else self.disks
