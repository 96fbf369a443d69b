# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a VM that is off: each file opened once, checked on its descriptor, and locked.

The format of a file comes from the configuration and never from its bytes. A qcow2 may refer to other files,
which QEMU would open with our rights: a backing file must be named in the configuration as well and be the
one that the header names; a data file and encryption are refused.
"""

import errno
import os
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupctl.errors import UNTOUCHED, MonitorUnreachable, Refused, RepositoryUnreadable, UsageError
from backupctl.images import foreign_header
from backupctl.images.foreign_header import ForeignHeader
from backupctl.images.open_image import OpenImage
from backupctl.names import DiskName, NodeName
from backupctl.options import ImageFile, ImageFormat, VmImage
from backupctl.system import image_lock, rights, safe_directory

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class OpenFile:
    """One file of a disk. device: a block device."""

    image: OpenImage
    format: ImageFormat
    device: bool

    @property
    def identity(self) -> tuple[int, int]:
        """What identifies the file or device, whatever its names are."""
        found = self.image.stat()
        return (0, found.st_rdev) if self.device else (found.st_dev, found.st_ino)

    def state(self) -> tuple[int, int]:
        """Return what differs once somebody has written to it, as far as its file system tells."""
        found = self.image.stat()
        return (0, 0) if self.device else (found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class DiskImages:
    """The files of one disk, newest first. number: of the disk."""

    disk: DiskName
    number: int
    files: tuple[OpenFile, ...]

    @property
    def node(self) -> NodeName:
        """The name of the newest image's node."""
        return NodeName(f"image{self.number}")

    @property
    def path(self) -> Path:
        """The newest image's path."""
        return self.files[0].image.path

    @property
    def format(self) -> ImageFormat:
        """The newest image's format."""
        return self.files[0].format

    @property
    def layers(self) -> tuple[NodeName, ...]:
        """The names of all files' nodes, newest first."""
        return tuple(NodeName(self._name("node", depth)) for depth in range(len(self.files)))

    def nodes(self) -> list[dict[str, Any]]:
        """Return QEMU's options for each node of the disk, so that each comes after those that it names.

        All are read-only; see `reopened`. Nothing else is opened than these descriptors.
        """
        options = []
        for depth, one in reversed(list(enumerate(self.files))):
            top = {"read-only": True, "file": self._name("file", depth), "driver": one.format}
            if one.format == "qcow2":
                top["backing"] = self._name("node", depth + 1) if depth + 1 < len(self.files) else None
            options += [self._file(depth, read_only=True), {**top, "node-name": self._name("node", depth)}]
        return options

    def reopened(self, *, read_only: bool) -> list[dict[str, Any]]:
        """Return the options of the newest image's two nodes for ``blockdev-reopen``."""
        node = {**self.nodes()[-1], "read-only": read_only}
        return [self._file(0, read_only=read_only), node]

    def _file(self, depth: int, *, read_only: bool) -> dict[str, Any]:
        one = self.files[depth]
        return {
            "driver": "host_device" if one.device else "file",
            "node-name": self._name("file", depth),
            "filename": one.image.name,
            "read-only": read_only,
            "locking": "on",
        }

    def _name(self, what: str, depth: int) -> str:
        if what == "node" and not depth:
            return self.node
        return f"{self.node}-{what}{depth}"


@contextmanager
def opened(images: Sequence[VmImage]) -> Iterator[tuple[DiskImages, ...]]:
    """Open all files of these images, for as long as the block lasts; keep writers off the raw ones.

    Raises Refused for a file that must not be used, MonitorUnreachable for one that cannot be, or is in use.
    """
    with ExitStack() as held:
        found = tuple(DiskImages(one.disk, number, _chain(one, held)) for number, one in enumerate(images))
        _refuse_doubles(found)
        yield found


def all_files(disks: Iterable[DiskImages]) -> list[OpenImage]:
    """Return all open files of disks."""
    return [one.image for disk in disks for one in disk.files]


def states(disks: Sequence[DiskImages]) -> list[tuple[int, int]]:
    """Return the state of each open file of these disks."""
    return [file.state() for disk in disks for file in disk.files]


def refuse_unwritable(disks: Sequence[DiskImages]) -> None:
    """Refuse an image whose bitmaps could not be stored in the end. Raises Refused."""
    for one in disks:
        if one.format == "qcow2":
            _refuse_unwritable(one.files[0])


def in_use(path: Path, host: str = "") -> MonitorUnreachable:
    """Return the error for an image that another process has open. host: "" for this machine."""
    where = f"on {host}: " if host else ""
    return MonitorUnreachable(
        f"{where}{path} is in use by another process, perhaps the VM itself",
        state=UNTOUCHED,
        hint="a VM that runs is backed up through its monitor: is qmp in the configuration its socket?",
    )


def _refuse_unwritable(one: OpenFile) -> None:
    try:
        os.close(os.open(one.image.name, os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        raise Refused(
            f"cannot write to {one.image.path}: {err.strerror}; the image stores which parts of it change",
            state=UNTOUCHED,
            hint=_advice(err, one.image.path, writes=True),
        ) from err


def _chain(image: VmImage, held: ExitStack) -> tuple[OpenFile, ...]:
    files = [_opened(one, held, writes=not depth) for depth, one in enumerate(image.files)]
    for number, one in enumerate(files):
        below = files[number + 1] if number + 1 < len(files) else None
        if one.format == "qcow2":
            _check_header(one, below)
        elif below is not None:
            raise _refused(one.image.path, "is a raw image, so it cannot have a backing file")
        else:
            _lock(one)
    return tuple(files)


def _opened(file: ImageFile, held: ExitStack, *, writes: bool) -> OpenFile:
    """Open a file for reading. writes: whether a daemon will also write to it, if it stores bitmaps."""
    try:
        path = safe_directory.resolve(file.path)
        # A device that is mounted, or part of a volume group, is refused: QEMU's lock tells nothing of that.
        descriptor = os.open(path, _FLAGS | (os.O_EXCL if path.is_block_device() else 0))
    except UsageError as err:
        hint = "let only root write to directories on the way to the image, or back it up as its owner"
        raise Refused(err.message, state=UNTOUCHED, hint=hint) from err
    except OSError as err:
        raise MonitorUnreachable(
            f"cannot open {file.path}: {err.strerror}",
            state=UNTOUCHED,
            hint=_advice(err, file.path, writes=writes and file.format == "qcow2"),
        ) from err
    image = held.enter_context(OpenImage(path, descriptor))
    found = image.stat()
    device = stat.S_ISBLK(found.st_mode)
    if not (device or stat.S_ISREG(found.st_mode)):
        raise _refused(path, "is neither a file nor a block device")
    return OpenFile(image, file.format, device)


def _advice(err: OSError, path: Path, *, writes: bool) -> str:
    return rights.advice(path, writes=writes) if err.errno == errno.EACCES else ""


def _check_header(one: OpenFile, below: OpenFile | None) -> None:
    path = one.image.path
    header = _header(one)
    for feature in sorted(header.features - {"backing"}):
        raise _refused(path, f"{header.describe(feature)}, which is not supported for a VM that is off")
    if header.corrupt or header.unclosed:
        what = (
            "is marked corrupt"
            if header.corrupt
            else "was not closed, and its reference counts are not valid"
        )
        raise _refused(path, what, next_command=f"qemu-img check -f qcow2 -r all {shlex.quote(str(path))}")
    if below is None and header.backing:
        raise _refused(
            path,
            f"{header.describe('backing')}, which the configuration does not name",
            hint='name it, if it is right: image = {DISK = "FILE,backing=FILE"}',
        )
    if below is not None and not _is_named(header.backing, path, below):
        raise _refused(path, f"does not have the backing file {below.image.path}")


def _header(one: OpenFile) -> ForeignHeader:
    try:
        return foreign_header.read(one.image.descriptor)
    except ValueError as err:
        raise _refused(
            one.image.path,
            f"is not a valid qcow2 image: {err}",
            hint="if it is a raw image, add ,format=raw to its path",
        ) from err
    except OSError as err:
        raise RepositoryUnreadable(f"cannot read {one.image.path}: {err.strerror}") from err


def _is_named(name: str, above: Path, below: OpenFile) -> bool:
    """Whether the name of a backing file in a header leads to that file."""
    try:
        found = (above.parent / name).stat()
    except (OSError, ValueError):
        return False
    return bool(name) and os.path.samestat(found, below.image.stat())


def _lock(one: OpenFile) -> None:
    try:
        image_lock.keep_from_writers(one.image.descriptor)
    except image_lock.InUse as err:
        raise in_use(one.image.path) from err
    except OSError as err:
        raise MonitorUnreachable(f"cannot lock {one.image.path}: {err.strerror}", state=UNTOUCHED) from err


def _refuse_doubles(disks: Iterable[DiskImages]) -> None:
    seen: dict[tuple[int, int], DiskName] = {}
    for one in disks:
        other = seen.setdefault(one.files[0].identity, one.disk)
        if other != one.disk:
            raise _refused(one.path, f"is the image of both {other} and {one.disk}")


def _refused(path: Path, why: str, *, hint: str = "", next_command: str = "") -> Refused:
    return Refused(f"{path} {why}", state=UNTOUCHED, hint=hint, next_command=next_command)
