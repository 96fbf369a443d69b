# SPDX-License-Identifier: GPL-2.0-or-later
"""How much room a run sets aside for its scratch files, decided before anything is touched.

With the fleecing view a scratch file that can't grow makes the GUEST's writes fail (measured). So each
disk's scratch has room of its own, allocated before the moment, and is never used up::

    0            give_up                          stop                  size
    ├──────────────┼────────────────────────────────┼─────────────────────┤
      the run        it is given up and rolled back   what is under way when QEMU's limit is lifted
                     (write threshold; the guard      for the roll-back; until then the guest waits
                     looks as well)                   here (a throttle group in QEMU)

A scratch that is as large as the whole disk can't be used up and needs none of this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupctl.errors import Refused
from backupctl.names import DiskName
from backupctl.system import files
from backupctl.vm.disk import Disk
from backupctl.vm.qmp import inventory, scratch
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import number, understood

MIB = 1 << 20
RESERVE_BYTES = 256 * MIB
"""For what the guest has under way: a virtio queue holds 256 requests, Linux makes them 1.25 MiB at most."""
RESERVE_UNLIMITED_BYTES = 512 * MIB
"""The same where QEMU itself can't limit the guest, and the run must be faster than it."""


@dataclass(frozen=True)
class ScratchBudget:
    """One disk's share. All in bytes.

    size: what is set aside. give_up: used so far, the run ends; None if it can't be used up. stop: QEMU
    itself lets no more in; None if it can't limit. wanted: what would do if all that the disk holds were
    overwritten.
    """

    size: int
    ideal_bytes: int
    abort_at: int | None
    stop: int | None


def limits(monitor: Monitor) -> bool:
    """Whether this QEMU can limit what goes into a scratch file.

    Before 9.0 a throttle node that joins a disk on an iothread crashes it (measured on 7.2.22:
    qemu_mutex_unlock_impl: Operation not permitted).
    """
    if not monitor.version.at_least(6, 0) or "query-iothreads" not in monitor.commands:
        return False
    return monitor.version.at_least(9, 0) or not monitor.execute("query-iothreads")


def plan_scratch(
    monitor: Monitor,
    chosen: Sequence[Disk],
    folder: Path,
    wish_bytes: int | None,
    *,
    others: str = "",
) -> tuple[ScratchBudget, ...]:
    """Share out the scratch folder's room. wish_bytes: as for `share`. Raises Refused, MonitorError.

    others: what of virtual machines lies on that file system too, in words; then LOW_BYTES are left to them.
    """
    scratch.check_folder(folder)
    free = max(files.free_bytes(folder) - (scratch.LOW_BYTES if others else 0), 0)
    nodes = inventory.named_nodes(monitor)
    reserve = RESERVE_BYTES if (limited := limits(monitor)) else RESERVE_UNLIMITED_BYTES
    held = [held_bytes(disk.size, nodes[disk.node]) for disk in chosen]
    sizes = {disk.name: disk.size for disk in chosen}
    made = share(sizes, held, free, wish_bytes, reserve, limited=limited)
    if made is None:
        raise _hopeless(sizes, folder, free, wish_bytes, reserve, others)
    return made


def held_bytes(size: int, node: Mapping[str, Any]) -> int:
    """Return how much of a disk is more than empty, as far as its node's reply tells; at most `size`.

    A disk over a backing image, or on a block device, is taken for full.
    """
    with understood("description of a disk"):
        image = node["image"]
        allocated = number(image.get("actual-size", 0))
        alone = not number(node.get("backing_file_depth", 0)) and "backing-filename" not in image
    return min(allocated, size) if alone and allocated > 0 else size


def share(
    sizes: Mapping[DiskName, int],
    held: Sequence[int],
    free_bytes: int,
    wish_bytes: int | None,
    reserve: int,
    *,
    limited: bool,
) -> tuple[ScratchBudget, ...] | None:
    """Give each disk its share of `wish_bytes`, or of half of what is free; None if that is hopeless.

    Half: others use that file system too, and the rest is a further reserve.
    """
    most = [whole(size) for size in sizes.values()]
    least = [min(whole_size, 2 * reserve) for whole_size in most]
    wanted = [min(whole_size, whole(data) + 2 * reserve) for whole_size, data in zip(most, held, strict=True)]
    budget = free_bytes // 2 if wish_bytes is None else wish_bytes
    if sum(least) > (free_bytes if wish_bytes is None else wish_bytes) or budget > free_bytes:
        return None
    part = _part(budget - sum(least), sum(wanted) - sum(least))
    return tuple(
        _room(low + int((high - low) * part), high, full, reserve, limited=limited)
        for low, high, full in zip(least, wanted, most, strict=True)
    )


def whole(size: int) -> int:
    """Return the most that a qcow2 file takes for `size` bytes of content."""
    return size + size // 512 + 2 * MIB


def _part(spare: int, lacking: int) -> float:
    return min(1.0, max(spare, 0) / lacking) if lacking else 1.0


def _room(size: int, wanted: int, most: int, reserve: int, *, limited: bool) -> ScratchBudget:
    if size >= most:
        return ScratchBudget(size, wanted, None, None)
    # A sixteenth: QEMU's limit counts what it writes again, too, such as its tables, and must not be met
    # before the threshold.
    stop = size - reserve * 3 // 4
    return ScratchBudget(size, wanted, size - reserve - size // 16, stop if limited else None)


def _hopeless(
    sizes: Mapping[DiskName, int],
    folder: Path,
    free: int,
    wish_bytes: int | None,
    reserve: int,
    others: str,
) -> Refused:
    least = sum(min(whole(size), 2 * reserve) for size in sizes.values())
    asked = "" if wish_bytes is None else f", of which {wish_bytes >> 20} MiB were asked for"
    kept = f" beside {scratch.LOW_BYTES >> 20} MiB for the guests ({others})" if others else ""
    return Refused(
        f"the scratch folder {folder} has {free >> 20} MiB left{kept}{asked}; to back up "
        f"{', '.join(sizes)} at least {-(-least // MIB)} MiB must be set aside, because the guest's own "
        "writes would fail if it were used up: choose another folder with --scratch",
        state="nothing was touched",
    )
