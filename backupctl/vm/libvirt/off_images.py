# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a domain that is off, as its definition names them.

The definition tells the format of each file, and after a snapshot the files below. Where it names no backing
file, and the image has one, it is the configuration that must name it: a header may have been written by a
QEMU that its guest had taken over. What the configuration says of a disk replaces what libvirt says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from backupctl.errors import UNTOUCHED, Refused
from backupctl.names import DiskName
from backupctl.options import ImageFile, ImageFormat, VmConfig, VmImage
from backupctl.vm.libvirt import domain, inventory
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.domain import DomainDisk


@dataclass(frozen=True)
class OffDisks:
    """A domain's disks. described: by the name that each is stored under. skipped: as for an inventory."""

    images: tuple[VmImage, ...]
    described: Mapping[DiskName, DomainDisk]
    skipped: tuple[tuple[str, str], ...]

    def target(self, name: DiskName) -> str:
        """Return libvirt's name of a disk."""
        return self.described[name].target


def find(connection: Connection, vm: VmConfig) -> OffDisks:
    """Ask libvirt which images a domain has.

    Raises Refused for a disk that cannot be read without its QEMU, MonitorError, Failed.
    """
    named = {one.disk: one for one in vm.images}
    images: list[VmImage] = []
    described: dict[DiskName, DomainDisk] = {}
    skipped = []
    for one in domain.describe(connection).disks:
        if one.why_not:
            skipped.append((one.target, one.why_not))
            continue
        name = inventory.stored_name(one, vm.disk_names, described.keys())
        described[name] = one
        images.append(named.pop(name) if name in named else _image(one, name))
    if named:
        known = ", ".join(described) or "none"
        raise Refused(
            f"the domain has no disk {', '.join(sorted(named))}, of which the configuration names the image; "
            f"its disks: {known}",
            state=UNTOUCHED,
        )
    return OffDisks(tuple(images), described, tuple(skipped))


def _image(one: DomainDisk, name: DiskName) -> VmImage:
    files = []
    for path, told in zip(one.files, one.formats, strict=True):
        if not path.startswith("/"):
            raise Refused(
                f"{name} is {path}, which is neither a file nor a device of this host; it can be backed up "
                "while the domain runs",
                state=UNTOUCHED,
                hint=f'if it is a volume, name its file: image = {{{name} = "FILE"}}',
            )
        kind = next((each for each in get_args(ImageFormat) if each == told), None)
        if kind is None:
            raise Refused(
                f"the format of {path} is {told or 'not told by libvirt'}; only qcow2 and raw images can be "
                "backed up while the domain is off",
                state=UNTOUCHED,
            )
        files.append(ImageFile(Path(path), kind))
    return VmImage(name, tuple(files))
