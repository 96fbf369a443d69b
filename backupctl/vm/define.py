# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain like a stored one, with other disks: its XML rewritten, and defined in libvirt.

The XML comes from a repository, and is root's own only as far as the repository is. So nothing of it is
executed here: it is parsed within bounds, changed as a tree, and given to libvirt.
"""

import shlex
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element, SubElement

from backupctl.errors import UNTOUCHED, CommandFailed, Failed, TargetExists
from backupctl.vm.libvirt import xml
from backupctl.vm.libvirt.connection import NO_DOMAIN, Connection

_REMOVABLE = ("cdrom", "floppy")


@dataclass(frozen=True)
class NewDisk:
    """The image that a disk of the domain gets."""

    path: Path
    format: Literal["qcow2", "raw"]


@dataclass(frozen=True)
class Changes:
    """What is different in the new domain.

    name: "" for the same. disks: by libvirt's target ("vda"). variables: the file of the UEFI variables, None
    to have libvirt make one. keep_identity: whether UUID and MAC addresses stay.
    """

    name: str
    disks: Mapping[str, NewDisk]
    variables: Path | None
    keep_identity: bool


@dataclass(frozen=True)
class Rewritten:
    """The new domain. notes: what the administrator must know of it, each as a sentence."""

    name: str
    uuid: str
    document: str
    notes: tuple[str, ...]


def rewritten(document: str, changes: Changes) -> Rewritten:
    """Return the XML of a new domain. Raises Failed if the stored one is not a domain's."""
    root = xml.parse(document)
    if root.tag != "domain" or not root.findtext("name", "").strip():
        raise Failed("the stored XML does not describe a domain of libvirt")
    notes: list[str] = []
    _identify(root, changes)
    for disk in root.findall("devices/disk"):
        notes += _redirect(disk, changes.disks)
    notes += _variables(root, changes.variables)
    if root.find("devices/tpm/backend[@type='emulator']") is not None:
        notes.append("the state of its TPM is not restored by itself: it is among the files of the point")
    text = ET.tostring(root, encoding="unicode")
    return Rewritten(root.findtext("name", ""), root.findtext("uuid", ""), text, tuple(notes))


def _identify(root: Element, changes: Changes) -> None:
    """Give the domain its name, and a UUID and MAC addresses of its own."""
    root.attrib.pop("id", None)
    if changes.name:
        _set_text(root, "name", changes.name)
    if changes.keep_identity:
        return
    made = str(uuid.uuid4())
    _set_text(root, "uuid", made)
    # libvirt refuses a domain whose SMBIOS has another UUID than the domain itself.
    for entry in root.findall("sysinfo/system/entry[@name='uuid']"):
        entry.text = made
    if (generation := root.find("genid")) is not None:
        generation.text = str(uuid.uuid4())
    for interface in root.findall("devices/interface"):
        for mac in interface.findall("mac"):  # libvirt makes one where there is none
            interface.remove(mac)


def _redirect(disk: Element, disks: Mapping[str, NewDisk]) -> Iterator[str]:
    """Have a disk use its restored image; yield what is to be known of one that was not restored."""
    target = disk.find("target")
    name = "" if target is None else target.get("dev", "")
    new = disks.get(name)
    if new is not None:
        _use(disk, new)
    elif disk.get("device", "disk") in _REMOVABLE:
        if disk.find("source") is not None:
            _remove(disk, "source", "backingStore")
            disk.set("type", "file")
            yield f"the drive {name} is empty: its medium is not part of the backup"
    else:
        yield f"the disk {name} was not restored: its source is that of the old host"


def _use(disk: Element, new: NewDisk) -> None:
    _remove(disk, "source", "backingStore", "mirror", "encryption", "auth")
    disk.set("type", "file")
    driver = disk.find("driver")
    if driver is None:
        driver = Element("driver")
        disk.insert(0, driver)
    driver.set("name", "qemu")
    driver.set("type", new.format)
    _remove(driver, "metadata_cache")
    disk.insert(1, Element("source", file=str(new.path)))


def _variables(root: Element, variables: Path | None) -> Iterator[str]:
    """Have the domain use the restored UEFI variables."""
    system, nvram = root.find("os"), root.find("os/nvram")
    if system is None or (nvram is None and variables is None):
        return
    if nvram is None:
        nvram = SubElement(system, "nvram")
    nvram.attrib.pop("type", None)
    _remove(nvram, "source")
    nvram.text = str(variables) if variables else None
    if variables is None:
        yield "the UEFI variables are not part of the point: libvirt makes new ones"


def _set_text(root: Element, tag: str, text: str) -> None:
    found = root.find(tag)
    if found is None:
        found = Element(tag)
        root.insert(0, found)
    found.text = text


def _remove(element: Element, *tags: str) -> None:
    for tag in tags:
        for found in element.findall(tag):
            element.remove(found)


def connected(uri: str, seconds: float) -> Connection:
    """Connect to a libvirt; the connection is closed at the end of a `with`. Raises MonitorUnreachable."""
    return Connection.to_host(uri, seconds)


def refuse_existing(connection: Connection, made: Rewritten) -> None:
    """Raise TargetExists if a domain has that name or UUID. Raises MonitorError."""
    handle = connection.handle
    if _is_there(connection, "virDomainLookupByName", lambda: handle.lookupByName(made.name)):
        raise TargetExists(
            f"libvirt has a domain named {made.name!r:.100} already",
            state=UNTOUCHED,
            next_command=shlex.join(["backupctl", "restore", "--domain", f"{made.name}-restored"]),
        )
    if made.uuid and _is_there(
        connection, "virDomainLookupByUUIDString", lambda: handle.lookupByUUIDString(made.uuid)
    ):
        raise TargetExists(
            f"libvirt has a domain with the UUID {made.uuid:.40} already",
            state=UNTOUCHED,
            hint="without --keep-identity the new domain gets a UUID of its own",
        )


def define(connection: Connection, made: Rewritten) -> None:
    """Define the domain; it is not started. Raises MonitorError."""
    connection.call("virDomainDefineXML", lambda: connection.handle.defineXML(made.document))


def _is_there(connection: Connection, call: str, look: Callable[[], object]) -> bool:
    try:
        connection.call(call, look)
    except CommandFailed as err:
        if err.error_class == NO_DOMAIN:
            return False
        raise
    return True
