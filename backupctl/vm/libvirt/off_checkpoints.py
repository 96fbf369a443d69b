# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints of a domain that is off: what libvirt notes of them, and their bitmaps in the images.

libvirt makes and deletes bitmaps only while QEMU runs. Of a domain that is off it can note a checkpoint, and
forget one. So the two are changed one after the other, in the order that leaves nothing that libvirt does not
know of, wherever a run ends:

::

    a new checkpoint      libvirt notes it      then the bitmaps are made
    an old one            the bitmaps go        then libvirt forgets it

A checkpoint without a bitmap is one that cannot be used: the disk is scanned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from backupctl.names import BitmapName, NodeName
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.driver import DiskSnapshot, PointFacts
from backupctl.vm.libvirt import checkpoints
from backupctl.vm.libvirt.checkpoints import Checkpoint, Deletion
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.off_images import OffDisks
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.qmp import bitmaps, inventory
from backupctl.vm.qmp.reply import number, understood


@dataclass(frozen=True)
class Layer:
    """One image of a disk. size: of the disk that it holds, in bytes."""

    node: NodeName
    size: int
    bitmaps: Mapping[str, Bitmap]


Layers = Mapping[str, Sequence[Layer]]
"""The images of each disk, newest first, by libvirt's name of the disk."""


def layers(daemon: Daemon, disks: OffDisks) -> Layers:
    """Look at the bitmaps of all images. Raises MonitorError."""
    nodes = inventory.named_nodes(daemon.monitor)
    with understood("description of the images"):
        return {
            disks.target(one.disk): [
                Layer(
                    node,
                    number(nodes[node]["image"]["virtual-size"]),
                    {each.name: each for each in inventory.bitmaps_of(node, nodes[node])},
                )
                for node in one.layers
            ]
            for one in daemon.disks
        }


def recorded(of_disk: Sequence[Layer], name: str) -> tuple[Bitmap, ...]:
    """Return the bitmaps that tell together what changed since a checkpoint, newest layer first.

    None if one of them cannot be used. libvirt demands the same of them (``qemuBlockBitmapChainIsValid`` in
    src/qemu/qemu_block.c): the newest image has one, and from there on each image down to the last that has.
    """
    found = [layer.bitmaps.get(name) for layer in of_disk]
    there = [one for one in found if one is not None]
    gap = found[: len(there)] != there
    other_size = any(layer.size != of_disk[0].size for layer in of_disk[: len(there)])
    if gap or other_size or not all(map(_usable, there)):
        return ()
    return tuple(there)


def listed(connection: Connection, images: Layers) -> tuple[Checkpoint, ...]:
    """Return all checkpoints, as `checkpoints.listed` does. Raises MonitorError, Failed."""
    return tuple(
        replace(one, sizes={target: _size(images.get(target, ()), one.name) for target in one.sizes})
        for one in checkpoints.listed(connection, off=True)
    )


def differential_bitmap(of_disk: Sequence[Layer], base: str, name: BitmapName) -> list[bitmaps.Action]:
    """Return what makes a disabled bitmap on a disk's newest image of all that changed since a checkpoint."""
    top = of_disk[0].node
    added = {"node": top, "name": name, "granularity": bitmaps.GRANULARITY_BYTES, "disabled": True}
    sources = [{"node": one.node, "name": one.name} for one in recorded(of_disk, base)]
    merged = {"node": top, "target": name, "bitmaps": sources}
    return [
        {"type": "block-dirty-bitmap-add", "data": added},
        {"type": "block-dirty-bitmap-merge", "data": merged},
    ]


def make(daemon: Daemon, disks: Sequence[DiskSnapshot], name: str) -> None:
    """Make the bitmaps of a checkpoint. Raises MonitorError."""
    with daemon.writable():
        daemon.monitor.transaction(
            [
                {
                    "type": "block-dirty-bitmap-add",
                    "data": {
                        "node": one.disk.node,
                        "name": name,
                        "granularity": bitmaps.GRANULARITY_BYTES,
                        "persistent": True,
                    },
                }
                for one in disks
            ]
        )


def plan(found: Sequence[Checkpoint], facts: PointFacts, images: Layers) -> tuple[Deletion, ...]:
    """Return which checkpoints of ours must go, as `checkpoints.plan` does, and can while the domain is off.

    One with a bitmap below the newest image of a disk stays until the domain runs: libvirt removes such a
    bitmap, and we open no image for writing that others may have below theirs. Raises RepositoryError.
    """
    beneath = {name for each in images.values() for layer in each[1:] for name in layer.bitmaps}
    return tuple(one for one in checkpoints.plan(found, facts) if one.checkpoint.name not in beneath)


def unknown(found: Sequence[Checkpoint], facts: PointFacts, images: Layers) -> tuple[Bitmap, ...]:
    """Return bitmaps of ours that no checkpoint has, so that nothing can use them."""
    known = {one.name for one in found}
    return tuple(
        one
        for each in images.values()
        for layer in each[:1]
        for one in layer.bitmaps.values()
        if one.name not in known
        and (point := facts.namespace.point_of(one.name)) is not None
        and one.name == checkpoints.checkpoint_name(facts.namespace, point)
        and not facts.is_another_vms(point)
    )


def remove(daemon: Daemon, images: Layers, names: Sequence[str]) -> None:
    """Remove the bitmaps of these names from the newest images. Raises MonitorError."""
    actions: list[bitmaps.Action] = [
        {"type": "block-dirty-bitmap-remove", "data": {"node": each[0].node, "name": name}}
        for each in images.values()
        for name in names
        if name in each[0].bitmaps
    ]
    if actions:
        with daemon.writable():
            daemon.monitor.transaction(actions)


def _size(of_disk: Sequence[Layer], name: str) -> int | None:
    found = recorded(of_disk, name)
    return sum(one.dirty_bytes for one in found) if found else None


def _usable(one: Bitmap) -> bool:
    return one.recording and one.persistent and not one.inconsistent
