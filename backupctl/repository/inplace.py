# SPDX-License-Identifier: GPL-2.0-or-later
"""An image or block device of the user's own that is changed where it stands, through QEMU.

QEMU locks it, so none that a VM uses is written; and it keeps the bitmaps in a qcow2, so that the VM's next
incremental knows of what was changed here.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupctl.errors import BackupctlError, Locked, RepositoryError, UsageError, WriteFailed
from backupctl.repository import durable, images, landing, qemu
from backupctl.repository.images import ImageFormat

_QCOW2_MAGIC = b"QFI\xfb"
_UNTOUCHED = "nothing was touched"


@dataclass(frozen=True)
class Target:
    """What is to be changed. path: resolved. device: a block device, not a file."""

    path: Path
    format: ImageFormat
    device: bool

    @classmethod
    def find(cls, path: Path, image_format: ImageFormat, *, named: bool) -> "Target":
        """Look at what stands there. named: the user named the format. Raises UsageError, OSError."""
        if not path.exists():
            raise UsageError(
                f"{path} does not exist: there is nothing of which only a part could have changed",
                state=_UNTOUCHED,
                next_command="the same without --only-changed",
            )
        found = path.resolve()
        device = found.is_block_device()
        if not device and not found.is_file():
            raise UsageError(f"{path} is neither a file nor a block device", state=_UNTOUCHED)
        if device and image_format != "raw":
            raise UsageError(f"a block device takes raw bytes, not a {image_format} image", state=_UNTOUCHED)
        # Some call a qcow2 "disk.img": its tables would be taken for the disk, and overwritten.
        with found.open("rb") as file:
            looks = file.read(4) == _QCOW2_MAGIC
        if not named and not device and looks != (image_format == "qcow2"):
            what = "is a qcow2 image" if looks else "is no qcow2 image"
            raise UsageError(
                f"{path} {what}, but its name says otherwise",
                state=_UNTOUCHED,
                next_command="the same with --format raw or --format qcow2",
            )
        return cls(found, image_format, device)

    def size(self) -> int:
        """Return its virtual size in bytes. Raises UsageError if it is in use, or no such image, OSError."""
        if self.format == "qcow2":
            done = qemu.img(["info", "--output=json", "-f", "qcow2", str(self.path)])
            if done.returncode:
                raise UsageError(f"{self.path} can't be used: {_first(done.stderr)}", state=_UNTOUCHED)
            return int(json.loads(done.stdout)["virtual-size"])
        try:
            with images.served(self._blockdev(), writable=True):
                pass  # qemu-img looks at a raw file without asking for its lock
        except (Locked, RepositoryError) as err:
            raise UsageError(f"{self.path} can't be used: {err.message}", state=_UNTOUCHED) from err
        with self.path.open("rb") as file:
            return file.seek(0, os.SEEK_END)

    def resize(self, size_bytes: int) -> None:
        """Give a file another virtual size. Raises WriteFailed."""
        done = qemu.img(["resize", "-q", "--shrink", "-f", self.format, str(self.path), str(size_bytes)])
        if done.returncode:
            raise WriteFailed(f"{self.path} can't be resized: {_first(done.stderr)}")

    @contextmanager
    def served(self, size_bytes: int) -> Iterator[Path]:
        """Serve it for reading and writing; yields the socket. When the block ends well, it is on the disk.

        What is read is what is on the disk, too: after a sync that failed the kernel would show what was
        written, as if it had been. size_bytes: what a device must have room for. Raises UsageError,
        RepositoryError, WriteFailed, OSError.
        """
        durable.sync_and_forget(self.path)
        if self.device:
            with landing.device(self.path, size_bytes), _closed_properly(self._blockdev()) as address:
                yield address
            return
        with _closed_properly(self._blockdev()) as address:
            yield address
        durable.sync_file(self.path)

    def _blockdev(self) -> dict[str, Any]:
        driver = "host_device" if self.device else "file"
        file = {"driver": driver, "filename": str(self.path), "discard": "unmap"}
        return {"driver": self.format, "discard": "unmap", "file": file}


@contextmanager
def _closed_properly(options: dict[str, Any]) -> Iterator[Path]:
    """Serve an image, and let QEMU close it also after an error of ours: it is not to be thrown away."""
    failure: BackupctlError | None = None
    try:
        with images.served(options, writable=True) as address:
            try:
                yield address
            except BackupctlError as err:
                failure = err
    except BackupctlError:
        if failure is None:
            raise
    if failure is not None:
        raise failure


def _first(said: str) -> str:
    return said.strip().splitlines()[0][:500] if said.strip() else "qemu-img says nothing"
