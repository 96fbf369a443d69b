# SPDX-License-Identifier: GPL-2.0-or-later
"""How a point boots by UEFI: with firmware of this host, and the variables that the point holds.

Plain QEMU has the variables as a disk, a flash chip; of a domain of libvirt they are a file. They come from a
guest. Nothing looks into them here: their size alone, as the manifest tells it, chooses the firmware.
"""

from dataclasses import dataclass
from pathlib import Path

from backupctl.operations import flash
from backupctl.repository import stored_files
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.vm.trial import firmware
from backupctl.vm.trial.options import TrialOptions


@dataclass(frozen=True)
class Uefi:
    """Firmware, and variables. disk: the disk that these are; None if they are a file, of this content."""

    code: Path
    disk: DiskEntry | None
    content: bytes


def of_point(point: Point, options: TrialOptions) -> Uefi | None:
    """Return how a point boots by UEFI; None if it has no variables, or if the options say how it boots.

    Raises UsageError if this host has no firmware for them, DamageFound, RepositoryError.
    """
    if options.firmware or options.kernel:
        return None
    file = stored_files.first(point.manifest.definition, "variables")
    if file is not None:
        code = firmware.code_for(file.size)
        return Uefi(code, None, stored_files.read(point.path, file))
    # A chip with the firmware's code may be writable, too, and is the larger one.
    chip = min(flash.disks(point), key=lambda one: one.size, default=None)
    return Uefi(firmware.code_for(chip.size), chip, b"") if chip else None
