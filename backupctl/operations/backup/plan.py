# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks a run takes, and from which base point: decided from what QEMU and the repository say.

Pure: nothing here asks or changes anything, so `status` can tell what the next run would do.

The base of a disk is the newest committed point that holds this disk (a run with ``--disk`` leaves
others out), or the one that a differential was asked to differ from. What changed since is in the
bitmaps of the points from the base on. They are used only if all are there, consistent and not in use,
on the active node, and the newest records. Anything else would be an incremental with a silent gap: then
the disk is scanned (read whole, and compared with the base's digests), or taken full.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from backupctl.errors import UNTOUCHED, Refused
from backupctl.names import BitmapName, DiskName, Namespace, PointId
from backupctl.options import Kind, OnBrokenChain
from backupctl.repository.point import Point
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.disk import Disk, Inventory

Objection = Callable[[PointId, DiskName], str | None]
"""Says what is wrong with a disk's chain at a point; None for nothing."""


@dataclass(frozen=True)
class ChainFacts:
    """What the repository knows of the chains that a run could go on with.

    points: the committed ones, oldest first. error: what is damaged. too_long: why a chain is to get no more
    layers; the disk is then taken full. absent: points that were committed and do not exist any more, and
    why, as an end of "the point ...".
    """

    namespace: Namespace
    points: tuple[Point, ...]
    error: Objection = lambda _point, _disk: None
    too_long: Objection = lambda _point, _disk: None
    absent: Mapping[PointId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DiskPlan:
    """How one disk is taken.

    base: the point that an incremental builds on, None for a full. bitmaps: those that together tell what
    changed since, oldest first; none for a full or a scan. reason: why there are none in an incremental
    run, "" otherwise. newest: of a differential by bitmaps, the point from which the newest of them records.
    damaged: whether the reason is damage in the repository.
    """

    disk: Disk
    kind: Kind
    base: PointId | None
    reason: str
    bitmaps: tuple[BitmapName, ...] = ()
    newest: PointId | None = None
    damaged: bool = False

    @property
    def scanned(self) -> bool:
        """Whether the disk is read whole and compared with the base."""
        return self.base is not None and not self.bitmaps


@dataclass(frozen=True)
class Plan:
    """How one run is taken. parent: the point that it builds on, None for a full.

    missing: the disks that it can't take, though the last points hold them.
    damaged: what can't be restored any more, as far as the run has to do with it: points, and disks of them.
    """

    kind: Kind
    parent: PointId | None
    disks: tuple[DiskPlan, ...]
    missing: tuple["MissingDisk", ...] = ()
    damaged: tuple[tuple[PointId, DiskName], ...] = ()


def plan(
    kind: Kind,
    disks: Sequence[Disk],
    inventory: Inventory,
    chains: ChainFacts,
    on_broken_chain: OnBrokenChain = "scan",
    since: Point | None = None,
) -> Plan:
    """Decide for each disk. since: of a differential.

    An incremental with no point to build on is a full. Raises Refused if a chain is broken and the
    user asked to fail then.
    """
    absent = missing((disk.name for disk in inventory.disks), chains.points)
    if kind == "full" or not chains.points:
        return Plan("full", None, tuple(DiskPlan(disk, "full", None, "") for disk in disks), absent)
    parent = since or chains.points[-1]
    plans = tuple(_incremental(disk, inventory, chains, since) for disk in disks)
    broken = [one for one in plans if one.reason]
    if broken and on_broken_chain == "fail":
        raise Refused(
            "; ".join(f"{one.disk.name} cannot be taken incrementally: {one.reason}" for one in broken),
            state=UNTOUCHED,
        )
    if on_broken_chain == "full":
        plans = tuple(
            DiskPlan(one.disk, "full", None, one.reason, damaged=one.damaged) if one.reason else one
            for one in plans
        )
    plans = tuple(_begun_anew(one, chains) for one in plans)
    return Plan("incremental", parent.id, plans, absent)


def _begun_anew(one: DiskPlan, chains: ChainFacts) -> DiskPlan:
    """Take a disk full whose chain is long enough."""
    reason = chains.too_long(one.base, one.disk.name) if one.base else ""
    return DiskPlan(one.disk, "full", None, reason) if reason else one


def _incremental(disk: Disk, inventory: Inventory, chains: ChainFacts, since: Point | None) -> DiskPlan:
    base = newest_with(disk.name, [since] if since else chains.points)
    if base is None:
        which = f"the point {since.id} does not hold it" if since else "no earlier point holds it"
        return DiskPlan(disk, "full", None, f"new disk: {which}")
    if damage := chains.error(base.id, disk.name):
        return DiskPlan(disk, "full", None, f"the chain of {base.id} is damaged: {damage}", damaged=True)
    # Each bitmap records from its point up to the next: a missing one is a gap.
    ids = [point.id for point in chains.points if point.id >= base.id and point.manifest.disk(disk.name)]
    for point in ids:
        if reason := bitmap_error(
            chains.namespace,
            point,
            disk,
            inventory.foreign_node_bitmaps,
            newest=point == ids[-1],
            absent=chains.absent,
        ):
            return DiskPlan(disk, "incremental", base.id, reason)
    names = tuple(chains.namespace.bitmap(point, disk.name) for point in ids)
    newest = ids[-1]
    if newest == base.id:
        return DiskPlan(disk, "incremental", base.id, "", names)
    if damage := chains.error(newest, disk.name):
        reason = f"the chain of {newest} is damaged: {damage}"
        return DiskPlan(disk, "incremental", base.id, reason, damaged=True)
    return DiskPlan(disk, "incremental", base.id, "", names, newest)


@dataclass(frozen=True)
class MissingDisk:
    """A disk that the VM does not have any more. point: the newest that holds it."""

    name: DiskName
    point: PointId

    def __str__(self) -> str:
        return f"{self.name} is not backed up: it is not among the VM's disks; {self.point} still holds it"


def missing(present: Iterable[DiskName], points: Sequence[Point]) -> tuple[MissingDisk, ...]:
    """Return the disks that the last points hold, and the VM has not (taken out, or under another name).

    One point need not tell it all: a run with ``--disk`` leaves others out. So as many are asked as it
    takes to meet each disk that the VM has; what only older ones hold was taken out on purpose.
    """
    there = frozenset(present)
    held = frozenset(entry.name for point in points for entry in point.manifest.disks)
    sought, gone = there & held, dict[DiskName, PointId]()
    for point in reversed(points):
        names = frozenset(entry.name for entry in point.manifest.disks)
        for name in names - there:
            gone.setdefault(name, point.id)
        sought -= names
        if not sought:
            break
    return tuple(MissingDisk(name, point) for name, point in sorted(gone.items()))


def newest_with(disk: DiskName, points: Sequence[Point]) -> Point | None:
    """Return the newest point that holds a disk of this name."""
    return next((point for point in reversed(points) if point.manifest.disk(disk)), None)


def bitmap_error(
    namespace: Namespace,
    base: PointId,
    disk: Disk,
    elsewhere: Sequence[Bitmap],
    *,
    newest: bool = True,
    absent: Mapping[PointId, str] = MappingProxyType({}),
) -> str:
    """Say why the bitmap of `base` can't tell what changed on this disk since; "" if it can.

    newest: whether it must record up to now; an older one recorded up to the next. absent: see `ChainFacts`.
    """
    name = namespace.bitmap(base, disk.name)
    # Also if the active node has one: libvirt gives the overlay of a snapshot an empty bitmap of each name,
    # and what was recorded before stays with the layer below.
    if any(bitmap.name == name for bitmap in elsewhere):
        return "its bitmap is on a layer that is no longer the active one (an external snapshot was taken)"
    bitmap = next((bitmap for bitmap in disk.bitmaps if bitmap.name == name), None)
    if bitmap is None:
        return _why_missing(base, newest=newest, absent=absent)
    if bitmap.inconsistent:
        return "its bitmap is inconsistent (QEMU did not end cleanly)"
    if not disk.trusts(bitmap):
        return "its data are in another file than its bitmap, and may have been replaced since it was stored"
    if disk.open_to_others:
        return "other VMs may write to it (share-rw=on), and its bitmap does not tell what they change"
    if newest and not bitmap.recording:
        return "its dirty bitmap is disabled, so changes may be missing from it"
    if bitmap.busy:
        return "its bitmap is in use by another operation"
    return ""


def _why_missing(base: PointId, *, newest: bool, absent: Mapping[PointId, str]) -> str:
    if later := max((point for point in absent if point > base), default=None):
        return f"the point {later} that its bitmap names {absent[later]}"
    if not newest:
        return f"the checkpoint of {base} is not kept in the VM (see --keep-checkpoints)"
    return "its bitmap is gone (QEMU ended without storing it, somebody removed it, or this is another disk)"
