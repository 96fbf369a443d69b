# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running domain's description tells: its disks, and who its QEMU runs as."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from backupctl.names import DiskName, NodeName, disk_name
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.disk import MAX_SIZE, Disk
from backupctl.vm.libvirt import xml
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.run_directory import HEADER_BYTES

_USER = re.compile(r"\+(\d{1,10}):\+(\d{1,10})", re.ASCII)
_OLD, _DATA_FILE = 2, 1 << 2
"""Of qcow2's header: the version that stores no bitmap, the bit of an external data file.
Source: docs/interop/qcow2.txt in QEMU's tree."""
_SAFE_POLICIES = ("", "stop", "enospace")
"""Of `error_policy`: those with which a write that fails for lack of space pauses the guest."""


@dataclass(frozen=True)
class DomainDisk:
    """One disk as libvirt describes it.

    target: libvirt's name ("vda"). files: those it consists of, the active one first; a domain that is off
    does not tell all of them. formats: of those, as the description has them. format: of the active one.
    why_not: why it is not backed up, "" if it is. error_policy: what becomes of a write that fails.
    old, apart: of a qcow2, whether it is of version 2, and whether its data lie in another file.
    """

    target: str
    names: tuple[str, ...]
    files: tuple[str, ...]
    format: str
    why_not: str
    error_policy: str
    iothread: bool
    encrypted: bool
    shared: bool
    old: bool = False
    apart: bool = False
    formats: tuple[str, ...] = ()

    @property
    def records(self) -> bool:
        """Whether it can have a checkpoint: only qcow2 of version 3 stores a bitmap."""
        return self.format == "qcow2" and not self.old

    @property
    def pauses(self) -> bool:
        """Whether the guest is paused, not given an error, when a scratch file is full."""
        return self.error_policy in _SAFE_POLICIES

    def stored_name(self, stored_names: Mapping[str, str]) -> DiskName:
        """Return what it is stored under. Raises InvalidName."""
        return disk_name(next((stored_names[one] for one in self.names if one in stored_names), self.target))


@dataclass(frozen=True)
class Description:
    """A domain. qemu_user: user and group of its QEMU, None if libvirt does not tell.

    security: the models of its security labels ("apparmor", "selinux").
    """

    disks: tuple[DomainDisk, ...]
    qemu_user: tuple[int, int] | None
    security: tuple[str, ...]

    def disk(self, target: str) -> DomainDisk | None:
        """Return the disk of that target; None without one."""
        return next((one for one in self.disks if one.target == target), None)


def describe(connection: Connection) -> Description:
    """Ask libvirt for a domain's description. Raises MonitorError, Failed."""
    found = parsed(connection.call("virDomainGetXMLDesc", connection.domain.XMLDesc))
    return replace(found, disks=tuple(_looked_at(one, connection) for one in found.disks))


def parsed(document: str) -> Description:
    """Read a domain's description. Raises Failed."""
    root = xml.parse(document)
    labels = root.findall("seclabel")
    qemu_user = next(
        (
            (int(found[1]), int(found[2]))
            for label in labels
            if label.get("model") == "dac" and (found := _USER.fullmatch(label.findtext("label", "")))
        ),
        None,
    )
    security = tuple(
        model for label in labels if (model := label.get("model", "")) not in ("", "dac", "none")
    )
    return Description(tuple(map(_disk, root.findall("devices/disk"))), qemu_user, security)


def _looked_at(one: DomainDisk, connection: Connection) -> DomainDisk:
    """Add what the image's header tells, and libvirt does not; a header that cannot be read tells nothing."""
    if one.format != "qcow2" or not one.files or not one.files[0].startswith("/"):
        return one
    header = connection.header(one.files[0])
    if len(header) < HEADER_BYTES or not header.startswith(b"QFI\xfb"):
        return one
    version, incompatible = (int.from_bytes(header[at : at + size]) for at, size in ((4, 4), (72, 8)))
    return replace(one, old=version == _OLD, apart=version > _OLD and bool(incompatible & _DATA_FILE))


def _disk(element: Element) -> DomainDisk:
    driver, target, alias = (element.find(name) for name in ("driver", "target", "alias"))
    name = "" if target is None else target.get("dev", "")
    serial = element.findtext("serial", "")
    return DomainDisk(
        target=name,
        names=tuple(one for one in (name, "" if alias is None else alias.get("name", ""), serial) if one),
        files=_files(element),
        formats=_formats(element),
        format="raw" if driver is None else driver.get("type", "raw"),
        why_not=_why_not(element),
        error_policy="" if driver is None else driver.get("error_policy", ""),
        iothread=driver is not None and driver.get("iothread") is not None,
        encrypted=element.find("encryption") is not None or element.find("source/encryption") is not None,
        shared=element.find("shareable") is not None,
    )


def _why_not(element: Element) -> str:
    if element.get("device", "disk") != "disk":
        return f"it is a {element.get('device')}"
    if element.find("readonly") is not None:
        return "it is read-only"
    if element.find("source") is None:
        return "it has no medium"
    if element.find("transient") is not None:
        return "it is transient: what the guest writes to it is thrown away"
    if element.get("type") in ("vhostuser", "vhostvdpa"):
        return "another process serves it to the guest, so no bitmap sees what the guest writes"
    return ""


def _files(element: Element) -> tuple[str, ...]:
    """Return the files of a disk and of its backing chain, the active one first."""
    found = []
    layer: Element | None = element
    while layer is not None:
        if (source := layer.find("source")) is not None:
            found.append(_place(source))
        layer = layer.find("backingStore")
    return tuple(found)


def _formats(element: Element) -> tuple[str, ...]:
    """Return the formats of the same files, "" for one that is not told."""
    driver = element.find("driver")
    found = ["" if driver is None else driver.get("type", "")]
    layer = element.find("backingStore")
    while layer is not None and layer.find("source") is not None:
        told = layer.find("format")
        found.append("" if told is None else told.get("type", ""))
        layer = layer.find("backingStore")
    return tuple(found)


def _place(source: Element) -> str:
    for key in ("file", "dev", "volume"):
        if value := source.get(key):
            return f"{source.get('pool')}/{value}" if key == "volume" else value
    hosts = ",".join(f"{one.get('name', '')}:{one.get('port', '')}" for one in source.findall("host"))
    return f"{source.get('protocol', '')}://{hosts}/{source.get('name', '')}"


def disk(connection: Connection, found: DomainDisk, name: DiskName, bitmaps: tuple[Bitmap, ...]) -> Disk:
    """Return a disk as the core knows it. Raises MonitorError."""
    target = found.target
    capacity, _, physical = connection.call(
        "virDomainGetBlockInfo", lambda: connection.domain.blockInfo(target)
    )
    alone = len(found.files) == 1 and found.files[0].startswith("/")
    return Disk(
        name=name,
        node=NodeName(target),
        size=capacity,
        driver=found.format,
        persistent=found.records,
        qdev=target,
        filename=found.files[0] if found.files else "",
        bitmaps=bitmaps,
        apart=found.apart,
        encrypted=found.encrypted,
        shared=found.shared,
        held_bytes=min(capacity, physical) if alone and physical else min(capacity, MAX_SIZE),
    )
