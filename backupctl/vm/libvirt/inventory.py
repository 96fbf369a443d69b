# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's disks as the core knows them, with its checkpoints as their bitmaps."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from backupctl.errors import UNTOUCHED, Failed, InvalidName, Refused
from backupctl.names import DiskName
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.libvirt import checkpoints, domain, job
from backupctl.vm.libvirt.checkpoints import Checkpoint
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.domain import DomainDisk


def inventory(
    connection: Connection,
    stored_names: Mapping[str, str],
    is_ours: Callable[[str], bool] = lambda _path: False,
    without: Collection[str] = (),
) -> Inventory:
    """Return a domain's disks. Raises Refused as `stored_name`, MonitorError, Failed.

    is_ours: whether a backup with such a socket is to be overlooked, since it will be ended. without: the
    names of checkpoints that will be gone.
    """
    there = tuple(one for one in checkpoints.listed(connection) if one.name not in without)
    disks: list[Disk] = []
    skipped: list[tuple[str, str]] = []
    busy = list(_others_backup(connection, is_ours))
    for found in domain.describe(connection).disks:
        if found.why_not:
            skipped.append((found.target, found.why_not))
            continue
        name = stored_name(found, stored_names, [one.name for one in disks])
        disks.append(domain.disk(connection, found, name, _bitmaps(there, found, name)))
        target = found.target
        if connection.call("virDomainGetBlockJobInfo", partial(connection.domain.blockJobInfo, target, 0)):
            busy.append((found.target, f"a block job of libvirt (copy, commit or pull) works on {target}"))
    return Inventory(tuple(disks), tuple(skipped), tuple(busy), ())


def bitmaps(connection: Connection, stored_names: Mapping[str, str]) -> tuple[Bitmap, ...]:
    """Return each checkpoint once for each of its disks. Raises Refused, MonitorError, Failed."""
    there = checkpoints.listed(connection)
    return tuple(
        bitmap
        for found in domain.describe(connection).disks
        if not found.why_not
        for bitmap in _bitmaps(there, found, stored_name(found, stored_names, ()))
    )


def refuse_changed(connection: Connection, disks: Sequence[Disk]) -> None:
    """Raise Failed if a disk is not the one that was listed any more, or has another size."""
    now = domain.describe(connection)
    for one in disks:
        found = now.disk(one.node)
        if found is None or not found.files or found.files[0] != one.filename:
            raise Failed(
                f"{one.name} was exchanged, or a snapshot of it was taken, while the run began",
                state=UNTOUCHED,
            )
        refuse_resized(connection, one)


def refuse_resized(connection: Connection, disk: Disk) -> None:
    """Raise Failed if a disk has another size than it was listed with."""
    size, _, _ = connection.call("virDomainGetBlockInfo", lambda: connection.domain.blockInfo(str(disk.node)))
    if size != disk.size:
        raise Failed(f"{disk.name} was resized while the run began: from {disk.size} to {size} bytes")


def _bitmaps(there: Sequence[Checkpoint], found: DomainDisk, name: DiskName) -> tuple[Bitmap, ...]:
    return checkpoints.bitmaps_of(there, found.target, name, found.files)


def _others_backup(connection: Connection, is_ours: Callable[[str], bool]) -> tuple[tuple[str, str], ...]:
    socket = job.socket_of_job(connection)
    if socket is None or is_ours(socket):
        return ()
    return (("", "somebody else's backup of this domain is under way (virsh domjobinfo tells more)"),)


def stored_name(found: DomainDisk, stored_names: Mapping[str, str], taken: Collection[DiskName]) -> DiskName:
    """Return the name that a disk is stored under. taken: by other disks.

    Raises Refused if it cannot have that name: a disk that is only left out would be missed when it is lost.
    """
    try:
        name = found.stored_name(stored_names)
    except InvalidName as err:
        raise Refused(f"{err}; give the disk a name in the configuration", state=UNTOUCHED) from err
    if name in taken:
        raise Refused(
            f"two disks of the VM are both called {name}: give them names in the configuration",
            state=UNTOUCHED,
        )
    return name
