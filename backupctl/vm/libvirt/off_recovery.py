# SPDX-License-Identifier: GPL-2.0-or-later
"""What of ours is in a domain that is off, and how it is finished or undone: decided by the points' names.

A backup job ends with its QEMU, so there are only checkpoints. Every line may be the last one of a dying
process; the next call goes on from there, whether the domain is off or runs.
"""

from dataclasses import replace

from backupctl.names import DiskName
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.driver import Foreseen, PointFacts
from backupctl.vm.libvirt import checkpoints, off_checkpoints
from backupctl.vm.libvirt.checkpoints import Checkpoint
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.off_images import OffDisks
from backupctl.vm.offline import recovery
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.offline.inventory import of_images
from backupctl.vm.qmp import teardown


def resolve(
    connection: Connection,
    daemon: Daemon,
    disks: OffDisks,
    facts: PointFacts,
    clients: teardown.Clients = teardown.NO_CLIENTS,
) -> list[str]:
    """Do the work of `driver.Resolver.resolve`. Raises MonitorError, RepositoryError, Failed."""
    done = teardown.teardown(daemon.monitor, facts.namespace, {}, clients=clients)
    recovery.drop_unions(daemon.monitor, facts.namespace)
    images = off_checkpoints.layers(daemon, disks)
    found = off_checkpoints.listed(connection, images)
    gone = off_checkpoints.plan(found, facts, images)
    unknown = off_checkpoints.unknown(found, facts, images)
    names = [one.checkpoint.name for one in gone]
    # Bitmaps first: libvirt forgets no checkpoint that still has one, so nothing records unknown to it.
    off_checkpoints.remove(daemon, images, [*names, *dict.fromkeys(one.name for one in unknown)])
    done += [_removed(one) for one in unknown]
    for one in gone:
        checkpoints.forget(connection, one.checkpoint.name)
        done.append(one.done)
    return done


def foresee(connection: Connection, daemon: Daemon, disks: OffDisks, facts: PointFacts) -> Foreseen:
    """Return what a run finds once it has recovered. Changes nothing. Raises MonitorError, Failed."""
    images = off_checkpoints.layers(daemon, disks)
    found = off_checkpoints.listed(connection, images)
    gone = off_checkpoints.plan(found, facts, images)
    names = {one.checkpoint.name for one in gone}
    left = [one for one in found if one.name not in names]
    planned = [one.planned for one in gone]
    planned += [f"to clean up: {_which(one)}" for one in off_checkpoints.unknown(found, facts, images)]
    return Foreseen(inventory(daemon, disks, left), tuple(planned))


def inventory(daemon: Daemon, disks: OffDisks, found: list[Checkpoint]) -> Inventory:
    """Return the domain's disks, with these checkpoints as their bitmaps. Raises MonitorError, Refused."""
    there = of_images(daemon)
    made = tuple(replace(one, bitmaps=bitmaps_of(disks, found, one)) for one in there.disks)
    return Inventory(made, disks.skipped, (), ())


def bitmaps_of(disks: OffDisks, found: list[Checkpoint], disk: Disk) -> tuple[Bitmap, ...]:
    """Return each checkpoint's part of a disk, on the disk's node."""
    described = disks.described[DiskName(disk.name)]
    made = checkpoints.bitmaps_of(found, described.target, disk.name, described.files)
    return tuple(replace(one, node=disk.node) for one in made)


def _which(one: Bitmap) -> str:
    return f"bitmap {one.name} on {one.node}, of which libvirt knows no checkpoint"


def _removed(one: Bitmap) -> str:
    return f"removed the {_which(one)}"
