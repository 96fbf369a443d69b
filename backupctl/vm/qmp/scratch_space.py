# SPDX-License-Identifier: GPL-2.0-or-later
"""How much room a run sets aside for its scratch files, decided before anything is touched.

With the fleecing view a scratch file that cannot grow makes the GUEST's writes fail
(``test_a_full_scratch_fails_the_guests_write_under_fleecing``). So each
disk's scratch file has space of its own, allocated before the point in time, and is never used up::

    0            abort_at                         throttle_at           size
    ├──────────────┼────────────────────────────────┼─────────────────────┤
      the run        it is given up and rolled back   what is under way when QEMU's limit is lifted
                     (write threshold; the guard      for the roll-back; until then the guest waits
                     looks as well)                   here (a throttle group in QEMU)

A scratch that is as large as the whole disk can't be used up and needs none of this.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from backupctl.errors import UNTOUCHED, Refused
from backupctl.names import DiskName
from backupctl.options import ScratchOptions
from backupctl.vm import scratch_directory
from backupctl.vm.disk import Disk
from backupctl.vm.driver import ScratchBudget
from backupctl.vm.qmp.files import LOCAL, Files
from backupctl.vm.qmp.monitor import Monitor

MIB = 1 << 20
RESERVE_BYTES = 256 * MIB
"""For what the guest has under way: a virtio queue holds 256 requests, Linux makes them 1.25 MiB at most."""
RESERVE_UNLIMITED_BYTES = 512 * MIB
"""The same where QEMU itself can't limit the guest, and the run must be faster than it."""


def limits(monitor: Monitor) -> bool:
    """Whether this QEMU can limit what goes into a scratch file.

    Before 9.0 a throttle node that joins a disk on an iothread crashes it (7.2.22, qemu_mutex_unlock_impl:
    Operation not permitted; docs/protocol.md, "Unexpected behaviour of QEMU").
    """
    if not monitor.version.at_least(6, 0) or "query-iothreads" not in monitor.commands:
        return False
    return monitor.version.at_least(9, 0) or not monitor.execute("query-iothreads")


def plan_scratch(
    monitor: Monitor,
    chosen: Sequence[Disk],
    options: ScratchOptions,
    *,
    guests: str = "",
    files: Files = LOCAL,
) -> tuple[ScratchBudget, ...]:
    """Share out the scratch directory's space. Arguments as for `plan`. Raises Refused, MonitorError."""
    return plan(chosen, options, limited=limits(monitor), guests=guests, files=files)


def plan(
    chosen: Sequence[Disk],
    options: ScratchOptions,
    *,
    limited: bool,
    guests: str = "",
    files: Files = LOCAL,
) -> tuple[ScratchBudget, ...]:
    """Share out the scratch directory's space. Raises Refused.

    limited: whether the guest can be limited in what it fills. guests: which guests need the same file
    system, in words; then LOW_BYTES are left to them. files: of the machine that QEMU runs on.
    """
    directory, wish_bytes = options.directory, options.size_bytes
    files.check_directory(directory)
    free = max(files.free_bytes(directory) - (scratch_directory.LOW_BYTES if guests else 0), 0)
    reserve = RESERVE_BYTES if limited else RESERVE_UNLIMITED_BYTES
    held = [disk.held_bytes for disk in chosen]
    sizes = {disk.name: disk.size for disk in chosen}
    made = share(sizes, held, free, wish_bytes, reserve, limited=limited)
    if made is None:
        raise _hopeless(sizes, directory, free, wish_bytes, reserve, guests)
    return made


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
    fraction = _fraction(budget - sum(least), sum(wanted) - sum(least))
    return tuple(
        _budget(low + int((high - low) * fraction), high, full, reserve, limited=limited)
        for low, high, full in zip(least, wanted, most, strict=True)
    )


def whole(size: int) -> int:
    """Return the most that a qcow2 file takes for `size` bytes of content."""
    return size + size // 512 + 2 * MIB


def _fraction(spare: int, lacking: int) -> float:
    return min(1.0, max(spare, 0) / lacking) if lacking else 1.0


def _budget(size: int, wanted: int, most: int, reserve: int, *, limited: bool) -> ScratchBudget:
    if size >= most:
        return ScratchBudget(size, wanted, None, None)
    # A sixteenth: QEMU's limit counts what it writes again, too, such as its tables, and must not be met
    # before the threshold.
    throttle_at = size - reserve * 3 // 4
    return ScratchBudget(size, wanted, size - reserve - size // 16, throttle_at if limited else None)


def _hopeless(
    sizes: Mapping[DiskName, int],
    directory: Path,
    free: int,
    wish_bytes: int | None,
    reserve: int,
    guests: str,
) -> Refused:
    least = sum(min(whole(size), 2 * reserve) for size in sizes.values())
    asked = "" if wish_bytes is None else f", of which {wish_bytes >> 20} MiB were asked for"
    kept = f" beside {scratch_directory.LOW_BYTES >> 20} MiB for the guests ({guests})" if guests else ""
    return Refused(
        f"the scratch directory {directory} has {free >> 20} MiB left{kept}{asked}; to back up "
        f"{', '.join(sizes)} at least {-(-least // MIB)} MiB must be set aside, because the guest's own "
        "writes would fail if it were used up: choose another directory with --scratch",
        state=UNTOUCHED,
    )
