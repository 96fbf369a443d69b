# SPDX-License-Identifier: GPL-2.0-or-later
"""All dirty bitmaps in a VM that a backupctl has made, of whichever repository; and removing some by name.

A bitmap goes with its image, so it outlives its repository, and comes along when a disk moves to another VM.
What nothing needs costs memory in QEMU and time at each of the guest's writes until somebody removes it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from backupctl.errors import UNTOUCHED, Refused, UsageError
from backupctl.names import BitmapName, BitmapParts, DiskName, NodeName, PointId, VmName, bitmap_parts
from backupctl.operations import recover
from backupctl.operations.backup import plan
from backupctl.options import DEFAULT_TIMEOUTS, Timeouts, VmConfig
from backupctl.repository import summary
from backupctl.repository.repository import Repository
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.driver import Driver
from backupctl.vm.open_driver import open_driver

Use = Literal["live", "checkpoint", "unfinished", "unusable", "other-vm", "orphan"]
Known = Callable[[], Sequence[Repository]]
"""Finds the repositories that the configuration names; called only if there are bitmaps of another one."""

_KEPT: dict[Use, str] = {
    "live": "the next incremental is based on it",
    "unfinished": "no point is there for it; `backupctl recover` cleans up and loses no change",
}


def nobody_else() -> Sequence[Repository]:
    """Know of no other repository."""
    return ()


@dataclass(frozen=True)
class StoredBitmap:
    """One bitmap on one node.

    repository: the tag in its name. known: whether that is a repository we know (this one, or one of the
    configuration). point, disk: from its name, "" if that has none. granularity, dirty_bytes: as QEMU tells.
    use: live (the base of the next incremental), checkpoint (kept for a differential), unfinished (the next
    run cleans it up), unusable (its point is the newest, but it can't tell what changed), other-vm (of a
    point of another VM of that repository), orphan (nothing needs it). why: the use, in words.
    """

    name: BitmapName
    node: NodeName
    disk: str
    point: PointId | None
    repository: str
    known: bool
    this_repository: bool
    granularity: int
    dirty_bytes: int
    state: str
    busy: bool
    persistent: bool
    read_only: bool
    use: Use
    why: str


@dataclass(frozen=True)
class Removal:
    """What a removal came to. left: bitmaps that QEMU did not remove, with its reason."""

    vm: VmName
    removed: tuple[StoredBitmap, ...]
    left: tuple[tuple[StoredBitmap, str], ...] = ()


def survey(
    driver: Driver, vm: VmConfig, repository: Repository | None, known: Known = nobody_else
) -> tuple[StoredBitmap, ...]:
    """Return every bitmap of ours, by node. Raises MonitorError, Refused, RepositoryError."""
    found = [(bitmap, parts) for bitmap in driver.bitmaps() if (parts := bitmap_parts(bitmap.name))]
    tags = {parts.tag for _, parts in found}
    judges = {one.owner.tag: _Judge.of(driver, vm, one) for one in _asked(tags, repository, known)}
    this = repository.owner.tag if repository else ""
    return tuple(
        _stored(bitmap, parts, judges.get(parts.tag), this=parts.tag == this)
        for bitmap, parts in sorted(found, key=lambda each: (each[0].node, each[0].name))
    )


def look(
    vm: VmConfig,
    repository: Repository | None,
    known: Known = nobody_else,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
) -> tuple[StoredBitmap, ...]:
    """Connect to the VM, and return its bitmaps. Raises as `survey`."""
    with open_driver(vm, timeouts) as driver:
        return survey(driver, vm, repository, known)


@dataclass(frozen=True)
class Unwanted:
    """Which bitmaps are to go: those of these names, and all of a repository's tag."""

    names: Sequence[str]
    tag: str | None


def remove(
    vm: VmConfig,
    repository: Repository | None,
    known: Known,
    unwanted: Unwanted,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    *,
    dry_run: bool = False,
) -> Removal:
    """Remove bitmaps.

    Holds the lock of the VM in each repository that is known. Raises UsageError for a name or tag that is
    not there, Refused for what is needed or in use (nothing is removed then), Locked, MonitorError.
    """
    with ExitStack() as held:
        for one in (*([repository] if repository else []), *known()):
            directory = one.vm(vm.name)
            if not dry_run and directory.exists():
                held.enter_context(directory.lock())
                held.enter_context(summary.renewed(directory))
        driver = held.enter_context(open_driver(vm, timeouts))
        chosen = _chosen(survey(driver, vm, repository, known), unwanted)
        _refuse_needed(chosen, vm)
        active = frozenset(disk.node for disk in driver.inventory().disks)
        return Removal(vm.name, tuple(chosen)) if dry_run else _removed(driver, vm, chosen, active)


def _asked(tags: set[str], repository: Repository | None, known: Known) -> Iterator[Repository]:
    """Yield the known repositories whose bitmaps were found."""
    if repository is not None:
        tags = tags - {repository.owner.tag}
        yield repository
    for one in known() if tags else ():
        if one.owner.tag in tags:
            yield one


@dataclass(frozen=True)
class _Judge:
    """What one repository knows of its bitmaps.

    live, unusable: by node and name. stay: what the next recovery leaves. others: the VM of each point of
    another VM.
    """

    vm: VmName
    disks: dict[NodeName, DiskName]
    live: frozenset[tuple[NodeName, BitmapName]]
    unusable: dict[BitmapName, str]
    stay: frozenset[tuple[NodeName, BitmapName]]
    committed: Callable[[PointId], bool]
    user_elsewhere: Callable[[PointId], VmName | None]
    what_became_of: Callable[[Iterable[PointId]], Mapping[PointId, str]]

    @classmethod
    def of(cls, driver: Driver, vm: VmConfig, repository: Repository) -> "_Judge":
        namespace, directory = repository.owner, repository.vm(vm.name)
        facts = recover.DirectoryFacts(directory, namespace)
        inventory = driver.foresee(facts).inventory
        points = directory.scan_points().points
        live, unusable = set(), {}
        for disk in inventory.disks:
            if newest := plan.newest_with(disk.name, points):
                name = namespace.bitmap(newest.id, disk.name)
                if why := plan.bitmap_error(namespace, newest.id, disk, inventory.foreign_node_bitmaps):
                    unusable[name] = why
                else:
                    live.add((disk.node, name))
        all_left = [
            *inventory.foreign_node_bitmaps,
            *(one for disk in inventory.disks for one in disk.bitmaps),
        ]
        return cls(
            vm.name,
            {disk.node: disk.name for disk in inventory.disks},
            frozenset(live),
            unusable,
            frozenset((one.node, one.name) for one in all_left),
            directory.is_committed,
            directory.user_elsewhere,
            facts.what_became_of,
        )

    def use(self, bitmap: Bitmap, parts: BitmapParts) -> tuple[Use, str]:
        """Say what a bitmap is for, and why."""
        if (bitmap.node, bitmap.name) in self.live:
            return "live", f"the next incremental of {parts.disk} is based on it"
        committed = parts.point is not None and self.committed(parts.point)
        if parts.point and not committed and (other := self.user_elsewhere(parts.point)):
            return "other-vm", f"its point belongs to {other}: the disk came from that VM"
        if bitmap.name in self.unusable:
            return "unusable", self.unusable[bitmap.name]
        if (bitmap.node, bitmap.name) not in self.stay and not bitmap.read_only:
            absent = self.what_became_of([parts.point]) if parts.point else {}
            of_point = "".join(f"its point {fate}; " for fate in absent.values())
            return "unfinished", f"{of_point}the next run, or `backupctl recover`, cleans it up"
        if not committed:
            return "orphan", "its point is gone"
        if bitmap.node not in self.disks:
            return "orphan", "its node is not one that a disk of the VM writes to"
        if self.disks[bitmap.node] != parts.disk:
            return "orphan", f"it is of {parts.disk or 'no disk'}, and this disk is {self.disks[bitmap.node]}"
        return "checkpoint", "kept for `--since` (--keep-checkpoints)"


def _stored(bitmap: Bitmap, parts: BitmapParts, judge: _Judge | None, *, this: bool) -> StoredBitmap:
    use: Use = "orphan"
    why = f"its repository {parts.tag} is not known here: it is gone, or not in the configuration"
    if judge is not None:
        use, why = judge.use(bitmap, parts)
    return StoredBitmap(
        name=bitmap.name,
        node=bitmap.node,
        disk=parts.disk,
        point=parts.point,
        repository=parts.tag,
        known=judge is not None,
        this_repository=this,
        granularity=bitmap.granularity,
        dirty_bytes=bitmap.dirty_bytes,
        state=bitmap.state,
        busy=bitmap.busy,
        persistent=bitmap.persistent,
        read_only=bitmap.read_only,
        use=use,
        why=why,
    )


def _chosen(found: Sequence[StoredBitmap], unwanted: Unwanted) -> list[StoredBitmap]:
    """Return the bitmaps that are meant: a name stands for it on all nodes."""
    names, tag = frozenset(unwanted.names), unwanted.tag
    if unknown := names - {one.name for one in found}:
        raise UsageError(
            f"the VM has no bitmap of backupctl named {', '.join(sorted(unknown)):.300}", state=UNTOUCHED
        )
    chosen = [one for one in found if one.name in names or one.repository == tag]
    if tag and not any(one.repository == tag for one in found):
        raise UsageError(f"the VM has no bitmap of a repository {tag:.100}", state=UNTOUCHED)
    return chosen


def _refuse_needed(chosen: Sequence[StoredBitmap], vm: VmConfig) -> None:
    for one in chosen:
        why = _KEPT.get(one.use) or ("another operation is using it" if one.busy else "")
        if why:
            raise Refused(
                f"the bitmap {one.name} on {one.node} is not removed: {why}",
                state=UNTOUCHED,
                next_command=f"backupctl bitmaps {vm.name}",
            )


def _removed(
    driver: Driver, vm: VmConfig, chosen: Sequence[StoredBitmap], active: frozenset[NodeName]
) -> Removal:
    """Remove them, those on active nodes first.

    Of two with one name the one on the backing layer (an external snapshot) tells that the other has a gap.
    It must not go before that, nor if that stays.
    """
    removed, left = list[StoredBitmap](), list[tuple[StoredBitmap, str]]()
    for one in sorted(chosen, key=lambda each: each.node not in active):
        if any(other.name == one.name for other, _ in left):
            left.append((one, "it stays as long as the one of the same name"))
            continue
        if refusal := driver.remove_bitmap(one.node, one.name):
            left.append((one, refusal))
        else:
            removed.append(one)
    # A driver may have to remove several together, such as libvirt, whose checkpoints are of all disks.
    there = {(one.node, one.name) for one in driver.bitmaps()} if left else set()
    removed += [one for one, _ in left if (one.node, one.name) not in there]
    left = [(one, why) for one, why in left if (one.node, one.name) in there]
    return Removal(vm.name, tuple(removed), tuple(left))
