# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks a run takes, and from which base point: decided from what QEMU and the repository say.

Pure: nothing here asks or changes anything, so `status` can tell what the next run would do.

The base of a disk is the newest committed point that holds this disk (a run with ``--disk`` leaves
others out). Its bitmap is used only if it lies on the active node, is consistent, records, and is not
in use. Anything else would be an incremental with a silent gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from backupctl.errors import Refused
from backupctl.names import DiskName, Owner, PointId
from backupctl.repository.layout import Point
from backupctl.settings import Kind, OnBrokenChain
from backupctl.vm.bitmaps import Bitmap
from backupctl.vm.disks import Disk, Inventory


@dataclass(frozen=True)
class DiskPlan:
    """How one disk is taken.

    base: the point that an incremental builds on, None for a full. reason: why an incremental run takes
    it full, "" otherwise.
    """

    disk: Disk
    kind: Kind
    base: PointId | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """How one run is taken. parent: the newest committed point, None for a full."""

    kind: Kind
    parent: PointId | None
    disks: tuple[DiskPlan, ...]


def plan(
    kind: Kind,
    disks: Sequence[Disk],
    inventory: Inventory,
    points: Sequence[Point],
    owner: Owner,
    on_broken_chain: OnBrokenChain = "full",
) -> Plan:
    """Decide for each disk. points: the committed ones, oldest first.

    An incremental with no point to build on is a full. Raises Refused if a chain is broken and the
    user asked to fail then.
    """
    if kind == "full" or not points:
        return Plan("full", None, tuple(DiskPlan(disk, "full", None, "") for disk in disks))
    plans = tuple(_incremental(disk, inventory, points, owner) for disk in disks)
    broken = [one for one in plans if one.base is None]
    if broken and on_broken_chain == "fail":
        raise Refused(
            "; ".join(f"{one.disk.name} can't be taken incrementally: {one.reason}" for one in broken),
            state="nothing was touched",
        )
    return Plan("incremental", points[-1].id, plans)


def _incremental(disk: Disk, inventory: Inventory, points: Sequence[Point], owner: Owner) -> DiskPlan:
    base = newest_with(disk.name, points)
    if base is None:
        return DiskPlan(disk, "full", None, "new disk: no earlier point holds it")
    reason = why_unusable(owner, base.id, disk, inventory.elsewhere)
    if reason:
        return DiskPlan(disk, "full", None, reason)
    return DiskPlan(disk, "incremental", base.id, "")


def newest_with(disk: DiskName, points: Sequence[Point]) -> Point | None:
    """Return the newest point that holds a disk of this name."""
    for point in reversed(points):
        if any(entry.name == disk for entry in point.manifest.disks):
            return point
    return None


def why_unusable(owner: Owner, base: PointId, disk: Disk, elsewhere: Sequence[Bitmap]) -> str:
    """Say why the bitmap of `base` can't tell what changed on this disk since; "" if it can."""
    name = owner.bitmap(base)
    found = [bitmap for bitmap in disk.bitmaps if bitmap.name == name]
    if not found:
        if any(bitmap.name == name for bitmap in elsewhere):
            return (
                "its bitmap is on a layer that is no longer the active one (an external snapshot was taken)"
            )
        return (
            "its bitmap is gone (QEMU ended without storing it, somebody removed it, or this is another disk)"
        )
    bitmap = found[0]
    if bitmap.inconsistent:
        return "its bitmap is inconsistent (QEMU did not end cleanly)"
    if not bitmap.recording:
        return "its bitmap is not recording: somebody disabled it, so changes may be missing from it"
    if bitmap.busy:
        return "its bitmap is in use by another operation"
    return ""
