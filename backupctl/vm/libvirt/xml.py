# SPDX-License-Identifier: GPL-2.0-or-later
"""The XML documents that libvirt takes and gives.

What is sent is built as a tree, so that every name is escaped. What arrives comes from root's own daemon, but
is bounded all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element, SubElement

from backupctl.errors import Failed

MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class BackupDisk:
    """One disk of a backup.

    target: as libvirt names it ("vda"). incremental: the checkpoint since which changes are told, None for a
    full. bitmap: the name under which the export tells of them.
    """

    target: str
    scratch: Path
    incremental: str | None
    bitmap: str


def parse(text: str) -> Element:
    """Parse a document of libvirt's. Raises Failed."""
    if len(text) > MAX_BYTES:
        raise Failed(f"libvirt sent an XML document of {len(text)} characters")
    try:
        return ET.fromstring(text)  # noqa: S314 - of root's own daemon, and bounded
    except ET.ParseError as err:
        raise Failed(f"libvirt sent an invalid XML document: {err}") from err


def backup(disks: Sequence[BackupDisk], others: Sequence[str], socket: Path) -> str:
    """Describe a backup in pull mode. others: the domain's disks that are not backed up."""
    root = Element("domainbackup", mode="pull")
    SubElement(root, "server", transport="unix", socket=str(socket))
    listed = SubElement(root, "disks")
    for one in disks:
        disk = SubElement(listed, "disk", name=one.target, backup="yes", type="file", exportname=one.target)
        if one.incremental is None:
            disk.set("backupmode", "full")
        else:
            disk.set("backupmode", "incremental")
            disk.set("incremental", one.incremental)
            disk.set("exportbitmap", one.bitmap)
        SubElement(disk, "driver", type="qcow2")
        SubElement(disk, "scratch", file=str(one.scratch))
    for name in others:
        SubElement(listed, "disk", name=name, backup="no")
    return ET.tostring(root, encoding="unicode")


@dataclass(frozen=True)
class Noted:
    """What libvirt must be told of a checkpoint that it does not make itself.

    created: seconds since 1970. parent: the newest checkpoint before it, "" without one.
    """

    created: int
    parent: str


def checkpoint(
    name: str,
    description: str,
    recorded: Sequence[str],
    others: Sequence[str],
    noted: Noted | None = None,
) -> str:
    """Describe a new checkpoint. recorded: the disks of which it records changes. others: all the rest.

    noted: of one whose bitmaps libvirt does not make.
    """
    root = Element("domaincheckpoint")
    SubElement(root, "name").text = name
    SubElement(root, "description").text = description
    if noted is not None:
        if noted.parent:
            SubElement(SubElement(root, "parent"), "name").text = noted.parent
        SubElement(root, "creationTime").text = str(noted.created)
    listed = SubElement(root, "disks")
    for target in recorded:
        SubElement(listed, "disk", name=target, checkpoint="bitmap")
    for target in others:
        SubElement(listed, "disk", name=target, checkpoint="no")
    return ET.tostring(root, encoding="unicode")


def server_socket(document: str) -> str:
    """Return the path of the socket of a backup under way; "" if it has none."""
    server = parse(document).find("server")
    return "" if server is None else server.get("socket", "")
