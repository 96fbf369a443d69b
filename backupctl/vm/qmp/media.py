# SPDX-License-Identifier: GPL-2.0-or-later
"""What each device of a VM writes to, and whether that is a disk to back up.

`query-block` tells the devices and the node each one writes to (the active node). While a job runs it shows
the job's filter in the disk's place. qemu-storage-daemon has no devices: there a disk is a node that is
exported to a guest (vhost-user-blk, vduse, FUSE).

Replies are read within `reply.understood`, which tells of one that is not made as it should be.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from backupctl.errors import CommandFailed
from backupctl.names import DiskName, NodeName, is_ours
from backupctl.vm.qmp.graph import Graph
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import flag, text, understood

_PASSED = frozenset({"scsi-block", "scsi-generic"})
_ELSEWHERE = ("vhost-user-blk", "vhost-user-scsi", "vhost-scsi")
JOB_FILTERS = frozenset({"copy-before-write", "backup-top", "mirror_top", "commit_top", "copy-on-read"})
"""What jobs put over a disk; the first and the last one may be a user's own as well."""
_NAMELESS = "#"
"""How the name of a node begins that nobody gave one."""


@dataclass(frozen=True)
class Medium:
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


def seen_through(
    device: Mapping[str, Any],
    nodes: Mapping[NodeName, Mapping[str, Any]],
    stored_names: Mapping[str, str],
    beneath: Mapping[DiskName, NodeName],
) -> Mapping[str, Any]:
    """Return a device as it will be when our filter is gone from it."""
    medium = from_device(device, nodes)
    node = beneath.get(stored_name(medium, stored_names))
    filtered = is_ours(medium.node) or driver_of(medium, nodes) in JOB_FILTERS
    return {**device, "inserted": nodes[node]} if filtered and node and node in nodes else device


def stored_name(medium: Medium, stored_names: Mapping[str, str]) -> DiskName:
    """Return the name that a medium is stored under. stored_names: as for `inventory`."""
    return DiskName(stored_names.get(medium.qemu_name, medium.qemu_name))


def from_device(device: Mapping[str, Any], nodes: Mapping[NodeName, Mapping[str, Any]]) -> Medium:
    """Read an entry of `query-block`. nodes: all named nodes."""
    qdev = text(device.get("qdev", ""))
    inserted = device.get("inserted")
    node = text(inserted.get("node-name", "")) if inserted else ""
    own = text(device.get("device", ""))
    name = _device_id(qdev) or ("" if node.startswith("#") else node) or own or node
    return Medium(name or "(unnamed)", node, qdev, _why_not(device, inserted, nodes))


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


def who_works(
    monitor: Monitor, medium: Medium, nodes: Mapping[NodeName, Mapping[str, Any]], known: Graph | None
) -> str:
    """Say who else works on a disk; "" if nobody does. A user's own filter is no job. Raises MonitorError."""
    driver = driver_of(medium, nodes)
    if medium.why_not:
        return ""
    if driver not in JOB_FILTERS:
        job = known.jobs.get(medium.node, "") if known else ""
        return f"another job works on {medium.qemu_name}: {job}" if job else ""
    if is_ours(medium.node):
        return (
            f"a run of backupctl works on {medium.qemu_name}, or has crashed: its top node is {medium.node}"
        )
    job = f"another job works on {medium.qemu_name}: its top node is a {driver}"
    if known is not None:
        return f"{job} of the job {known.jobs[medium.node]}" if medium.node in known.jobs else ""
    if driver == "copy-on-read" and not medium.node.startswith(_NAMELESS):
        return ""
    return job if medium.node.startswith(_NAMELESS) or monitor.execute("query-block-jobs") else ""


def driver_of(medium: Medium, nodes: Mapping[NodeName, Mapping[str, Any]]) -> str:
    """Return the block driver of the node that a medium writes to; "" if it has none."""
    return text(nodes.get(NodeName(medium.node), {}).get("drv", ""), 100)


def kinds(monitor: Monitor) -> dict[str, str]:
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


def unless_passed_through(medium: Medium, kinds: Mapping[str, str]) -> Medium:
    """Say why not of a SCSI device that hands the guest's commands to the disk as they are.

    All that it writes is SG_IO (QEMU's hw/scsi): no bitmap sees it, and a filter over the disk, such as a
    job's, does not let it pass.
    """
    kind = kinds.get(_path(medium.qdev))
    if medium.why_not or kind not in _PASSED:
        return medium
    return replace(medium, why_not=f"it is passed through ({kind}), so no bitmap sees what the guest writes")


def lets_others_write(monitor: Monitor, qdev: str) -> bool:
    """Whether a device lets other devices, or other VMs, write to its disk (``share-rw=on``).

    Raises MonitorError.
    """
    if not qdev:
        return False
    try:
        found = monitor.execute("qom-get", {"path": _path(qdev), "property": "share-rw"})
    except CommandFailed:  # a device without this property keeps others off
        return False
    with understood("property share-rw"):
        return flag(found)


def served_elsewhere(kinds: Mapping[str, str]) -> list[Medium]:
    """Return the disks that another process serves to the guest: `query-block` doesn't tell of them."""
    return [
        Medium(path.rpartition("/")[2], "", "", f"another process serves it to the guest ({kind})")
        for path, kind in kinds.items()
        if kind.startswith(_ELSEWHERE)
    ]


def exported(exports: list[Mapping[str, Any]], nodes: Mapping[NodeName, Mapping[str, Any]]) -> list[Medium]:
    """Return what a storage daemon exports to guests, by its `query-block-exports`."""
    names = {text(export["node-name"]) for export in exports if not is_ours(export["id"])}
    return [
        Medium(name, name, "", "it is read-only" if flag(nodes[NodeName(name)].get("ro", False)) else "")
        for name in sorted(names & set(nodes))
    ]


def once_each(found: list[Medium], stored_names: Mapping[str, str]) -> list[Medium]:
    """Say why not of each device but the first of those that write to one node (share-rw).

    The first takes the node for all of them, and knows that it is not alone.
    """
    first: dict[str, int] = {}
    once: list[Medium] = []
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


def _path(qdev: str) -> str:
    return qdev if "/" in qdev else f"/machine/peripheral/{qdev}"


def _device_id(qdev: str) -> str:
    """Return the id that the user gave a device.

    `query-block` shows the id itself (scsi-hd, ide-cd) or, for virtio, the path of a part of the device:
    `/machine/peripheral/vd0/virtio-backend` is vd0.
    """
    if "/" not in qdev:
        return qdev
    parts = qdev.strip("/").split("/")
    return parts[2] if parts[:2] == ["machine", "peripheral"] and len(parts) > 2 else ""
