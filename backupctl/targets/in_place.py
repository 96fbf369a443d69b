# SPDX-License-Identifier: GPL-2.0-or-later
"""An image or block device of the user that is changed in place, through QEMU.

QEMU locks it, so an image that a VM uses is never written; and QEMU keeps the bitmaps in a qcow2 up to date,
so the VM's next incremental knows what was changed here.

The format is known before the file is opened and never guessed from its bytes: those of a raw disk are the
guest's. The file is opened once. The header of a qcow2 is read from that descriptor, and QEMU gets it.
"""

import errno
import json
import os
import shlex
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backupctl.errors import UNTOUCHED, BackupctlError, Locked, RepositoryError, UsageError, WriteFailed
from backupctl.images import foreign_header, nbd_server, open_image
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import ForeignHeader, ImageFeature
from backupctl.images.open_image import OpenImage
from backupctl.system import qemu_tools, safe_directory

if TYPE_CHECKING:
    import subprocess


@dataclass(frozen=True)
class Target:
    """What is to be changed. path: resolved. device: a block device, not a file.

    descriptor: the open file, for reading and writing. layered: a qcow2 whose backing file QEMU is to read.
    alone: a qcow2 that consists of one file.
    """

    path: Path
    format: ImageFormat
    device: bool
    descriptor: int
    layered: bool
    alone: bool

    @property
    def identity(self) -> tuple[int, int]:
        """What identifies the file or device, whatever its names are."""
        found = os.fstat(self.descriptor)
        return (0, found.st_rdev) if self.device else (found.st_dev, found.st_ino)

    def size(self) -> int:
        """Return its virtual size in bytes. Raises UsageError if it is in use, or no such image, OSError."""
        if self.format == "qcow2":
            done = self._img("info", "--output=json", self._argument())
            if done.returncode:
                raise self._unusable(done.stderr)
            return int(json.loads(done.stdout)["virtual-size"])
        try:
            with nbd_server.served(self._blockdev(), writable=True, images=[self._image]):
                pass  # unlike qemu-img, the server takes the lock of a raw file
        except (Locked, RepositoryError) as err:
            raise self._unusable(err.message) from err
        return os.lseek(self.descriptor, 0, os.SEEK_END)

    def resize(self, size_bytes: int) -> None:
        """Change the virtual size of a file. Raises WriteFailed."""
        done = self._img("resize", "-q", "--shrink", self._argument(), str(size_bytes))
        if done.returncode:
            raise WriteFailed(self._reason(done.stderr), subject=f"cannot resize {self.path}")

    @contextmanager
    def served(self) -> Iterator[Path]:
        """Serve it for reading and writing; yields the socket. When the block ends, all writes are durable.

        Raises RepositoryError, WriteFailed, OSError.
        """
        # After a failed fsync the kernel may keep pages that are not on the disk and call them clean. Without
        # this, such a page would be compared as if it were stored, and not be written again.
        os.fsync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with _closed_properly(self._blockdev(), self._image) as address:
            if self.alone:
                self._refuse_other_files(address)
            yield address
        os.fsync(self.descriptor)

    def _blockdev(self) -> dict[str, Any]:
        driver = "host_device" if self.device else "file"
        file = {"driver": driver, "filename": self._image.name, "discard": "unmap"}
        options = {"driver": self.format, "discard": "unmap", "file": file}
        # Without "backing" QEMU would open the file that the header names, even one that was put there later.
        return options if self.format == "raw" or self.layered else {**options, "backing": None}

    def _img(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run qemu-img with the rights of the image's owner only: its header may change at any time."""
        found = os.fstat(self.descriptor)
        lent = os.geteuid() == 0 and found.st_uid != 0
        rights = (found.st_uid, found.st_gid) if lent else None
        return qemu_tools.img(arguments, descriptors=[self.descriptor], rights=rights)

    def _refuse_other_files(self, address: Path) -> None:
        """Refuse to go on if QEMU opened another file: the header was changed after it was checked."""
        for entry in Path("/proc", str(nbd_server.process_of(address)), "fd").iterdir():
            with suppress(FileNotFoundError):
                found, name = entry.stat(), entry.readlink()
                image = (found.st_dev, found.st_ino) == self.identity
                own = not found.st_nlink or name.parent == address.parent.resolve()
                if image or own or not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
                    continue
                raise UsageError(
                    f"{self.path} was changed by another process meanwhile, so QEMU opened {name}",
                    state="nothing was written to either",
                )

    def _argument(self) -> str:
        return f"json:{json.dumps(self._blockdev())}"

    @property
    def _image(self) -> OpenImage:
        return OpenImage(self.path, self.descriptor)

    def _unusable(self, complaint: str) -> UsageError:
        if qemu_tools.in_use(complaint):
            return UsageError(f"{self.path} is in use by another process, perhaps a VM", state=UNTOUCHED)
        return UsageError(f"cannot use {self.path}: {self._reason(complaint)}", state=UNTOUCHED)

    def _reason(self, complaint: str) -> str:
        """Return QEMU's reason, without the options that it repeats, and with the name that users know."""
        lines = complaint.strip().splitlines() or ["qemu-img printed no reason"]
        reason = lines[0].replace(self._argument(), str(self.path))
        return open_image.named(reason, [self._image])[:500]


@contextmanager
def opened(path: Path, image_format: ImageFormat, allowed: Collection[ImageFeature]) -> Iterator[Target]:
    """Open an existing file or device, once, as an image of that format.

    allowed: what a qcow2 may refer to, because the user says so. Raises UsageError, OSError.
    """
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; --only-changed needs an existing image",
            state=UNTOUCHED,
            hint="restore without --only-changed, or name an image that exists",
        )
    try:
        found = safe_directory.resolve(path)
    except UsageError as err:
        raise err.add(state=UNTOUCHED) from err
    device = found.is_block_device()
    if device and image_format != "raw":
        raise UsageError(f"a block device holds raw data, not a {image_format} image", state=UNTOUCHED)
    descriptor = _open(found, device=device)
    try:
        if image_format == "raw":
            yield Target(found, image_format, device, descriptor, layered=False, alone=False)
            return
        features = _features(path, descriptor, allowed)
        yield Target(found, image_format, device, descriptor, "backing" in features, alone=not features)
    finally:
        os.close(descriptor)


def _open(found: Path, *, device: bool) -> int:
    """Open a file or a block device. A device in use (mounted, part of a volume group) is refused."""
    claim = os.O_EXCL if device else 0
    try:
        descriptor = os.open(found, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | claim)
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise UsageError(
                f"{found} is in use (mounted, or part of a volume group)", state=UNTOUCHED
            ) from err
        raise
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISBLK(mode) if device else stat.S_ISREG(mode)):
        os.close(descriptor)
        raise UsageError(f"{found} is neither a file nor a block device", state=UNTOUCHED)
    return descriptor


def _features(path: Path, descriptor: int, allowed: Collection[ImageFeature]) -> frozenset[ImageFeature]:
    """Return what a qcow2 refers to; refuse what is not allowed."""
    try:
        header = foreign_header.read(descriptor)
    except ValueError as err:
        raise UsageError(
            f"{path} is not a valid qcow2 image: {err}",
            state=UNTOUCHED,
            hint="if it is a raw image",
            next_command="backupctl restore --format raw",
        ) from err
    if header.corrupt:
        raise UsageError(
            f"{path} is marked corrupt",
            state=UNTOUCHED,
            next_command=f"qemu-img check -f qcow2 -r all {shlex.quote(str(path))}",
        )
    for feature in sorted(header.features.difference(allowed) | (header.features & {"encryption"})):
        raise _leads_elsewhere(path, header, feature)
    return header.features


def _leads_elsewhere(path: Path, header: ForeignHeader, feature: ImageFeature) -> UsageError:
    message = f"{path} {header.describe(feature)}"
    if feature == "encryption":
        return UsageError(
            f"{message}: cannot change it in place",
            state=UNTOUCHED,
            hint="restore to a new file, without --only-changed",
        )
    return UsageError(
        f"{message}: QEMU would open that file, too",
        state=UNTOUCHED,
        hint="if that file is the image's own",
        next_command=f"backupctl restore --allow-image-feature {feature}",
    )


@contextmanager
def _closed_properly(options: dict[str, Any], image: OpenImage) -> Iterator[Path]:
    """Serve an image, and let QEMU close it even after an error of ours: the user keeps this image."""
    failure: BackupctlError | None = None
    try:
        with nbd_server.served(options, writable=True, images=[image]) as address:
            try:
                yield address
            except BackupctlError as err:
                failure = err
    except BackupctlError:
        if failure is None:
            raise
    if failure is not None:
        raise failure
