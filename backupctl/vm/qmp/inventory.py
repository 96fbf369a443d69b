# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's disks: which there are, what their active node is, and which bitmaps lie where.

`query-block` tells the devices and the node each one writes to (the active node);
`query-named-block-nodes` (flat) tells the bitmaps of every node. Bitmaps are never taken from
`query-block`: while a job runs it shows the job's filter in the disk's place.

qemu-storage-daemon has no devices: there a disk is a node that is exported to a guest (vhost-user-blk,
vduse, FUSE).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from backupctl.errors import CommandFailed, Failed, InvalidName, MonitorError, Refused
from backupctl.names import PREFIX, BitmapName, DiskName, NodeName, disk_name
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.disk import MAX_SIZE, Disk, Inventory
from backupctl.vm.qmp import bitmaps, graph
from backupctl.vm.qmp.graph import Graph
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import flag, number, text, understood

_PASSED = frozenset({"scsi-block", "scsi-generic"})
_ELSEWHERE = ("vhost-user-blk", "vhost-user-scsi", "vhost-scsi")
_JOB_FILTERS = frozenset({"copy-before-write", "backup-top", "mirror_top", "commit_top", "copy-on-read"})
"""What jobs put over a disk; the first and the last one may be a user's own as well."""
_FIRMWARE = re.compile(r"/machine/(?:\w+\.)?flash\d+", re.ASCII)
"""The flash chips of a machine (`system.flash1`, `virt.flash1`); a writable one has UEFI's variables."""
_NAMELESS = "#"
"""How the name of a node begins that nobody gave one."""


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
        devices = [_seen_through(device, nodes, names, beneath or {}) for device in devices]
        found = [_from_device(device, nodes) for device in devices] if devices else _exported(exports, nodes)
        kinds = _kinds(monitor)
        found = [_unless_passed_through(medium, kinds) for medium in found] + _served_elsewhere(kinds)
        known = _graph(monitor, found, nodes)
        ours = {medium.node for medium in found if _stored_name(medium, names) in (beneath or {})}
        found = [
            # A job of ours that is about to go is not somebody else's.
            replace(medium, busy="" if medium.node in ours else _who_works(monitor, medium, nodes, known))
            for medium in found
        ]
        return _collect(found, nodes, names, known)


def of_nodes(monitor: Monitor, names: Mapping[NodeName, DiskName]) -> Inventory:
    """List nodes as disks, whatever uses them. names: those that they are stored under.

    Raises MonitorError, Refused.
    """
    nodes = named_nodes(monitor)
    with understood("description of its block nodes"):
        found = [_Found(name, node, "", "") for node, name in names.items()]
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


def refuse_moved(monitor: Monitor, disks: Iterable[Disk]) -> None:
    """Raise Failed if a device writes to another node than when it was listed: a snapshot came between.

    To be called while no view or job stands over the disks. Raises MonitorError too.
    """
    by_device = root_nodes(monitor)
    for disk in disks:
        if disk.qdev and (top := by_device.get(disk.qdev)) != disk.node:
            raise Failed(
                f"{disk.name} writes to {top or 'nothing'} now, not to {disk.node}: an external snapshot was "
                "taken while the run began, or its medium was changed"
            )


def refuse_resized(monitor: Monitor, disks: Iterable[Disk]) -> None:
    """Raise Failed if a disk has another size than when it was listed. Raises MonitorError if it is gone.

    From the point in time on QEMU refuses a resize; one just before it would cut the view short.
    """
    nodes = named_nodes(monitor)
    for disk in disks:
        try:
            size = nodes[disk.node]["image"]["virtual-size"]
        except (KeyError, TypeError) as err:
            raise MonitorError(f"the node {disk.node} of {disk.name} has gone") from err
        if size != disk.size:
            raise Failed(f"{disk.name} was resized while the run began")


def refuse_disabled(monitor: Monitor, recording: Mapping[NodeName, BitmapName]) -> None:
    """Raise Failed if a bitmap, by its node, has stopped to record since it was listed.

    The transaction disables it all the same, and nobody could tell afterwards. Raises MonitorError.
    """
    nodes = named_nodes(monitor)
    for node, name in recording.items():
        found = {bitmap.name: bitmap for bitmap in bitmaps_of(node, nodes.get(node, {}))}
        if name not in found or not found[name].recording:
            raise Failed(f"somebody removed or disabled the bitmap {name} of {node} while the run began")


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


@dataclass(frozen=True)
class _Found:
    """A medium before it is decided whether it is a disk to back up.

    why_not: "" if it is. busy: who else works on it, "" if nobody does. shared: whether another device
    writes to its node too.
    """

    qemu_name: str
    node: str
    qdev: str
    why_not: str
    busy: str = ""
    shared: bool = False


def _seen_through(
    device: Mapping[str, Any],
    nodes: Mapping[NodeName, Mapping[str, Any]],
    stored_names: Mapping[str, str],
    beneath: Mapping[DiskName, NodeName],
) -> Mapping[str, Any]:
    """Return a device as it will be when our filter is gone from it."""
    medium = _from_device(device, nodes)
    node = beneath.get(_stored_name(medium, stored_names))
    filtered = medium.node.startswith(PREFIX) or _driver(medium, nodes) in _JOB_FILTERS
    return {**device, "inserted": nodes[node]} if filtered and node and node in nodes else device


def _stored_name(medium: _Found, stored_names: Mapping[str, str]) -> DiskName:
    return DiskName(stored_names.get(medium.qemu_name, medium.qemu_name))


def _from_device(device: Mapping[str, Any], nodes: Mapping[NodeName, Mapping[str, Any]]) -> _Found:
    qdev = text(device.get("qdev", ""))
    inserted = device.get("inserted")
    node = text(inserted.get("node-name", "")) if inserted else ""
    own = text(device.get("device", ""))
    name = _device_id(qdev) or ("" if node.startswith("#") else node) or own or node
    return _Found(name or "(unnamed)", node, qdev, _why_not(device, inserted, nodes))


def _why_not(
    device: Mapping[str, Any], inserted: Mapping[str, Any] | None, nodes: Mapping[NodeName, Mapping[str, Any]]
) -> str:
    if not inserted:
        return "the drive is empty"
    if flag(inserted.get("ro", False)):
        return "it is read-only"
    if flag(device.get("removable", False)) and "tray_open" in device:
        return "it is a removable medium"
    if inserted.get("node-name", "") not in nodes:
        return "its node has no name"
    return ""


def _graph(
    monitor: Monitor, found: Iterable[_Found], nodes: Mapping[NodeName, Mapping[str, Any]]
) -> Graph | None:
    """Ask for the block graph where something hangs on it. Raises MonitorError.

    A job whose filter nobody named is not seen in `query-block` (mirror, commit, stream).
    """
    filtered = any(_driver(medium, nodes) in _JOB_FILTERS for medium in found)
    encrypted = any(map(_encrypted, nodes.values()))
    return graph.ask(monitor) if filtered or encrypted or monitor.execute("query-block-jobs") else None


def _who_works(
    monitor: Monitor, medium: _Found, nodes: Mapping[NodeName, Mapping[str, Any]], known: Graph | None
) -> str:
    """Say who else works on a disk; "" if nobody does. A user's own filter is no job. Raises MonitorError."""
    driver = _driver(medium, nodes)
    if medium.why_not:
        return ""
    if driver not in _JOB_FILTERS:
        job = known.jobs.get(medium.node, "") if known else ""
        return f"another job works on {medium.qemu_name}: {job}" if job else ""
    if medium.node.startswith(PREFIX):
        return (
            f"a run of backupctl works on {medium.qemu_name}, or has crashed: its top node is {medium.node}"
        )
    job = f"another job works on {medium.qemu_name}: its top node is a {driver}"
    if known is not None:
        return f"{job} of the job {known.jobs[medium.node]}" if medium.node in known.jobs else ""
    if driver == "copy-on-read" and not medium.node.startswith(_NAMELESS):
        return ""
    return job if medium.node.startswith(_NAMELESS) or monitor.execute("query-block-jobs") else ""


def _driver(medium: _Found, nodes: Mapping[NodeName, Mapping[str, Any]]) -> str:
    return text(nodes.get(NodeName(medium.node), {}).get("drv", ""), 100)


def _kinds(monitor: Monitor) -> dict[str, str]:
    """Return the type of each device that a user made, by its path. Raises MonitorError."""
    found = {}
    for directory in ("/machine/peripheral", "/machine/peripheral-anon"):
        try:
            listed = monitor.execute("qom-list", {"path": directory})
        except CommandFailed:  # a storage daemon has no machine
            continue
        for entry in listed:
            if (kind := text(entry["type"])).startswith("child<"):
                found[f"{directory}/{text(entry['name'])}"] = kind[len("child<") : -1]
    return found


def _unless_passed_through(medium: _Found, kinds: Mapping[str, str]) -> _Found:
    """Say why not of a SCSI device that hands the guest's commands to the disk as they are.

    All that it writes is SG_IO (QEMU's hw/scsi): no bitmap sees it, and a filter over the disk, such as a
    job's, does not let it pass.
    """
    path = medium.qdev if "/" in medium.qdev else f"/machine/peripheral/{medium.qdev}"
    kind = kinds.get(path)
    if medium.why_not or kind not in _PASSED:
        return medium
    return replace(medium, why_not=f"it is passed through ({kind}), so no bitmap sees what the guest writes")


def _served_elsewhere(kinds: Mapping[str, str]) -> list[_Found]:
    """Return the disks that another process serves to the guest: `query-block` doesn't tell of them."""
    return [
        _Found(path.rpartition("/")[2], "", "", f"another process serves it to the guest ({kind})")
        for path, kind in kinds.items()
        if kind.startswith(_ELSEWHERE)
    ]


def _exported(exports: list[Mapping[str, Any]], nodes: Mapping[NodeName, Mapping[str, Any]]) -> list[_Found]:
    names = {text(export["node-name"]) for export in exports if not export["id"].startswith(PREFIX)}
    return [
        _Found(name, name, "", "it is read-only" if flag(nodes[NodeName(name)].get("ro", False)) else "")
        for name in sorted(names & set(nodes))
    ]


def _once_each(found: list[_Found], stored_names: Mapping[str, str]) -> list[_Found]:
    """Say why not of each device but the first of those that write to one node (share-rw).

    The first takes the node for all of them, and knows that it is not alone.
    """
    first: dict[str, int] = {}
    once: list[_Found] = []
    for medium in found:
        if medium.why_not or medium.busy or medium.node not in first:
            if not medium.why_not and not medium.busy:
                first[medium.node] = len(once)
            once.append(medium)
            continue
        at = first[medium.node]
        name = stored_names.get(once[at].qemu_name, once[at].qemu_name)
        once[at] = replace(once[at], shared=True)
        why = f"it is the same disk as {name} (node {medium.node}), and backed up once, under that name"
        once.append(replace(medium, why_not=why))
    return once


def _collect(
    found: list[_Found],
    nodes: Mapping[NodeName, Mapping[str, Any]],
    stored_names: Mapping[str, str],
    known: Graph | None,
) -> Inventory:
    disks: dict[DiskName, Disk] = {}
    found = _once_each(found, stored_names)
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
    medium: _Found,
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
        firmware=bool(_FIRMWARE.fullmatch(medium.qdev)),
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


def _device_id(qdev: str) -> str:
    """Return the id that the user gave a device.

    `query-block` shows the id itself (scsi-hd, ide-cd) or, for virtio, the path of a part of the device:
    `/machine/peripheral/vd0/virtio-backend` is vd0.
    """
    if "/" not in qdev:
        return qdev
    parts = qdev.strip("/").split("/")
    return parts[2] if parts[:2] == ["machine", "peripheral"] and len(parts) > 2 else ""
