# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves a point to a throw-away VM: its disks, and the UEFI variables that the VM boots by.

Whatever is a disk of the point is served through an overlay, a file without a name in the scratch directory,
which the kernel frees when the test ends, by whatever cause.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import UNTOUCHED, Failed, WriteFailed
from backupctl.images import create, public_server
from backupctl.images.open_image import OpenImage
from backupctl.images.public_server import ServedImage
from backupctl.names import DiskName
from backupctl.operations import flash
from backupctl.operations.uefi import Uefi
from backupctl.repository import chain
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import listen, private_dir
from backupctl.vm.trial.machine import TrialDisk, TrialFirmware

_UNNAMED = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Served:
    """What the VM gets. firmware: None for that of the options."""

    disks: Sequence[TrialDisk]
    firmware: TrialFirmware | None


@dataclass(frozen=True)
class Wanted:
    """What is to be served. disks: which; none for all. uefi: None if the VM does not boot by variables.

    scratch: the directory for what the guest writes.
    """

    directory: VmDirectory
    point: Point
    disks: tuple[DiskName, ...]
    uefi: Uefi | None
    scratch: Path


@contextmanager
def served(wanted: Wanted) -> Iterator[Served]:
    """Serve the point on a private socket, and yield a connection to each of its disks.

    Raises NoSuchPoint for a disk that the point does not have, DamageFound, RepositoryError, WriteFailed,
    Failed.
    """
    chip = wanted.uefi.disk if wanted.uefi else None
    with ExitStack() as held:
        entries = [*_entries(wanted), *([chip] if chip else [])]
        images = [held.enter_context(_image(wanted, one)) for one in entries]
        directory = held.enter_context(private_dir.directory())
        public = directory / "public"
        public.mkdir(mode=0o700)
        listening = held.enter_context(listen.unix(public / "nbd.sock"))
        held.enter_context(public_server.serve(images, listening))
        disks = [TrialDisk(one.name, held.enter_context(_connected(public / "nbd.sock"))) for one in images]
        if wanted.uefi is None:
            yield Served(disks, None)
        else:
            variables = disks.pop() if chip else wanted.uefi.content
            yield Served(disks, TrialFirmware(wanted.uefi.code, variables))


def _entries(wanted: Wanted) -> list[DiskEntry]:
    manifest = wanted.point.manifest
    for name in wanted.disks:
        if manifest.disk(name) is None:
            raise chain.no_such_disk(wanted.point, name)
    # As a disk, a chip could take the place of the disk that the guest boots from.
    chips = flash.disks(wanted.point)
    asked = (one for one in manifest.disks if not wanted.disks or one.name in wanted.disks)
    return [one for one in asked if one not in chips]


@contextmanager
def _image(wanted: Wanted, entry: DiskEntry) -> Iterator[ServedImage]:
    layers = chain.layers(wanted.directory, wanted.point, entry.name)
    with _unnamed(wanted.scratch) as overlay, chain.opened(layers) as opened:
        create.create_layer(overlay, entry.size, None)
        yield ServedImage.layered(entry.name, overlay, opened)


@contextmanager
def _unnamed(scratch: Path) -> Iterator[OpenImage]:
    try:
        descriptor = os.open(scratch, _UNNAMED, 0o600)
    except OSError as err:
        raise WriteFailed(
            f"cannot create a file in {scratch}: {err.strerror}",
            state=UNTOUCHED,
            hint="name another directory with --scratch",
        ) from err
    with OpenImage(scratch / "(overlay)", descriptor) as made:
        yield made


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(_CONNECT_SECONDS)
        try:
            made.connect(str(path))
        except OSError as err:
            raise Failed(f"cannot connect to the NBD server: {err.strerror or err}") from err
        made.settimeout(None)  # QEMU gets it
        yield made
