# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's disks: which there are, and which bitmaps lie where.

`query-named-block-nodes` (flat) tells the bitmaps of every node. They are never taken from `query-block`:
while a job runs it shows the job's filter in the disk's place (see `media`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from backupctl.errors import InvalidName, Refused
from backupctl.names import DiskName, NodeName, disk_name
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import FLASH_CHIP
from backupctl.vm.disk import MAX_SIZE, Disk, Inventory
from backupctl.vm.qmp import bitmaps, graph, media
from backupctl.vm.qmp.graph import Graph
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import flag, number, text, understood


def inventory(
    monitor: Monitor,
    stored_names: Mapping[str, str] | None = None,
    beneath: Mapping[DiskName, NodeName] | None = None,
) -> Inventory:
    """Ask QEMU for its disks.

    stored_names: QEMU's name of a disk to the name it is stored under. beneath: disks over which a filter
    of ours stands that is about to go, with the node that they then write to. Raises Refused if two disks
    would have one name, or a name can't be used; MonitorError if the replies make no sense.
    """
    names = stored_names or {}
    nodes = named_nodes(monitor)
    devices = monitor.execute("query-block")
    exports = [] if devices else monitor.execute("query-block-exports")
    with understood("description of its disks"):
        devices = [media.seen_through(device, nodes, names, beneath or {}) for device in devices]
        found = (
            [media.from_device(device, nodes) for device in devices]
            if devices
            else media.exported(exports, nodes)
        )
        kinds = media.kinds(monitor)
        found = [media.unless_passed_through(medium, kinds) for medium in found] + media.served_elsewhere(
            kinds
        )
        known = _graph(monitor, found, nodes)
        ours = {medium.node for medium in found if media.stored_name(medium, names) in (beneath or {})}
        found = [
            # A job of ours that is about to go is not somebody else's.
            replace(
                medium, busy="" if medium.node in ours else media.who_works(monitor, medium, nodes, known)
            )
            for medium in found
        ]
        listed = _collect(found, nodes, names, known)
    return replace(listed, disks=tuple(_with_sharing(monitor, disk) for disk in listed.disks))


def _with_sharing(monitor: Monitor, disk: Disk) -> Disk:
    # Of a qcow2 QEMU shares nothing, whatever the device allows.
    others = not disk.persistent and media.lets_others_write(monitor, disk.qdev)
    return replace(disk, open_to_others=others)


def of_nodes(monitor: Monitor, names: Mapping[NodeName, DiskName]) -> Inventory:
    """List nodes as disks, whatever uses them. names: those that they are stored under.

    Raises MonitorError, Refused.
    """
    nodes = named_nodes(monitor)
    with understood("description of its block nodes"):
        found = [media.Medium(name, node, "", "") for node, name in names.items()]
        return _collect(found, nodes, {}, None)


def all_bitmaps(monitor: Monitor) -> tuple[Bitmap, ...]:
    """Return the bitmaps of every node. Raises MonitorError."""
    return tuple(one for node, reply in named_nodes(monitor).items() for one in bitmaps_of(node, reply))


def named_nodes(monitor: Monitor) -> dict[NodeName, Mapping[str, Any]]:
    """Return every named node as `query-named-block-nodes` shows it. Raises MonitorError."""
    reply = monitor.execute("query-named-block-nodes", {"flat": True})
    with understood("description of its block nodes"):
        return {NodeName(text(node["node-name"])): node for node in reply if node.get("node-name")}


def root_nodes(monitor: Monitor) -> dict[str, str]:
    """Return the node that each device writes to, by the device's name. Raises MonitorError."""
    devices = monitor.execute("query-block")
    with understood("description of its devices"):
        return {
            text(device.get("qdev", "")): text(device["inserted"]["node-name"])
            for device in devices
            if device.get("inserted")
        }


def with_bitmaps(found: Inventory, after: Mapping[NodeName, tuple[Bitmap, ...]]) -> Inventory:
    """Return an inventory with other bitmaps on these nodes."""
    elsewhere = {bitmap.node: after.get(bitmap.node) for bitmap in found.foreign_node_bitmaps}
    kept = [one for one in found.foreign_node_bitmaps if elsewhere[one.node] is None]
    return replace(
        found,
        disks=tuple(replace(disk, bitmaps=after.get(disk.node, disk.bitmaps)) for disk in found.disks),
        foreign_node_bitmaps=(*kept, *(one for bitmaps in elsewhere.values() for one in bitmaps or ())),
    )


def bitmaps_of(node: NodeName, reply: Mapping[str, Any]) -> tuple[Bitmap, ...]:
    """Return the bitmaps of one node of `named_nodes`. Raises MonitorError."""
    with understood(f"description of the bitmaps of {node}"):
        read_only = bool(reply.get("ro"))
        parsed = (bitmaps.parse(node, entry, read_only=read_only) for entry in reply.get("dirty-bitmaps", ()))
        return tuple(bitmap for bitmap in parsed if bitmap)


def _graph(
    monitor: Monitor, found: Iterable[media.Medium], nodes: Mapping[NodeName, Mapping[str, Any]]
) -> Graph | None:
    """Ask for the block graph where something hangs on it. Raises MonitorError.

    A job whose filter nobody named is not seen in `query-block` (mirror, commit, stream).
    """
    filtered = any(media.driver_of(medium, nodes) in media.JOB_FILTERS for medium in found)
    encrypted = any(map(_encrypted, nodes.values()))
    return graph.ask(monitor) if filtered or encrypted or monitor.execute("query-block-jobs") else None


def _collect(
    found: list[media.Medium],
    nodes: Mapping[NodeName, Mapping[str, Any]],
    stored_names: Mapping[str, str],
    known: Graph | None,
) -> Inventory:
    disks: dict[DiskName, Disk] = {}
    found = media.once_each(found, stored_names)
    for medium in found:
        if not medium.why_not and not medium.busy:
            disk = _disk(medium, nodes, stored_names, known)
            if disk.name in disks:
                raise Refused(
                    f"two disks of the VM are both called {disk.name}: give them names in the configuration"
                )
            disks[disk.name] = disk
    active = {disk.node for disk in disks.values()}
    return Inventory(
        disks=tuple(disks.values()),
        skipped=tuple((medium.qemu_name, medium.why_not) for medium in found if medium.why_not),
        busy=tuple((medium.qemu_name, medium.busy) for medium in found if medium.busy),
        foreign_node_bitmaps=tuple(
            bitmap for name, node in nodes.items() if name not in active for bitmap in bitmaps_of(name, node)
        ),
    )


def _disk(
    medium: media.Medium,
    nodes: Mapping[NodeName, Mapping[str, Any]],
    stored_names: Mapping[str, str],
    known: Graph | None,
) -> Disk:
    try:
        name = disk_name(stored_names.get(medium.qemu_name, medium.qemu_name))
    except InvalidName as err:
        raise Refused(f"{err}; give the disk a name in the configuration") from err
    node = nodes[NodeName(medium.node)]
    image = node["image"]
    beneath = known.under(medium.node) if known else frozenset({medium.node})
    return Disk(
        name=name,
        node=NodeName(medium.node),
        size=number(image["virtual-size"], MAX_SIZE),
        driver=text(node["drv"], 100),
        persistent=_keeps_bitmaps(image),
        qdev=medium.qdev,
        filename=str(image.get("filename", ""))[:4096],
        bitmaps=bitmaps_of(NodeName(medium.node), node),
        apart=_lies_apart(image),
        encrypted=any(_encrypted(nodes[NodeName(name)]) for name in beneath if name in nodes),
        shared=medium.shared,
        firmware=bool(FLASH_CHIP.fullmatch(medium.qdev)),
        held_bytes=_held_bytes(number(image["virtual-size"], MAX_SIZE), node),
    )


def _held_bytes(size: int, node: Mapping[str, Any]) -> int:
    """Return how much of a disk is more than empty, as far as its node's reply tells; at most `size`.

    A disk over a backing image, or on a block device, is taken to be full.
    """
    image = node["image"]
    allocated = number(image.get("actual-size", 0))
    alone = not number(node.get("backing_file_depth", 0)) and "backing-filename" not in image
    return min(allocated, size) if alone and allocated > 0 else size


def _keeps_bitmaps(image: Mapping[str, Any]) -> bool:
    # Only qcow2 of version 3 ("compat 1.1") has room for bitmaps in the file.
    if image.get("format") != "qcow2" or _lies_apart(image):
        return False
    return str(_specific(image).get("compat", "")) == "1.1"


def _lies_apart(image: Mapping[str, Any]) -> bool:
    # The name is missing where only the command line knows it; the flag is there with every data file.
    return not {"data-file", "data-file-raw"}.isdisjoint(_specific(image))


def _specific(image: Mapping[str, Any]) -> Mapping[str, Any]:
    data: Mapping[str, Any] = image.get("format-specific", {}).get("data", {})
    return data


def _encrypted(node: Mapping[str, Any]) -> bool:
    return flag(node.get("encrypted", False))
