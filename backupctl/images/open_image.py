# SPDX-License-Identifier: GPL-2.0-or-later
"""A file that is opened once, checked on its descriptor, and handed to QEMU's tools as that descriptor.

Between our check of a name and QEMU's open, somebody could put another file in its place: a link, which root
would follow, or an image that keeps its data in another file. So QEMU never gets the name. The child inherits
the descriptor and opens ``/proc/self/fd/N``, which is the same file whatever has happened to its name. QEMU
opens it again, with its own flags and locks.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from backupctl.images import qcow2_header
from backupctl.images.qcow2_header import Header
from backupctl.system import durable, safe_open

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class OpenImage:
    """An open file and the name that it was opened by; the name is for messages only.

    `name` is the file name that QEMU gets; it is valid in a child that inherits `descriptor`.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Open an existing regular file, not a link. Raises NotThere, RepositoryUnreadable."""
        return cls(path, safe_open.open_descriptor(path, os.O_RDWR if writable else os.O_RDONLY))

    @classmethod
    def create(cls, path: Path) -> Self:
        """Create an empty file that only its owner may read. Raises FileExistsError, OSError."""
        return cls(path, os.open(path, _NEW, 0o600))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a child that inherited the descriptor keeps it."""
        os.close(self.descriptor)

    @property
    def name(self) -> str:
        """The name by which a child that inherits the descriptor opens the same file."""
        return f"/proc/self/fd/{self.descriptor}"

    def header(self) -> Header:
        """Read its header. Raises DamageFound if backupctl would not have written it."""
        return qcow2_header.read_open(self.descriptor, self.path)

    def stat(self) -> os.stat_result:
        """Return its status, whatever its name is now. Raises OSError."""
        return os.fstat(self.descriptor)

    def sync(self) -> None:
        """Flush its content to stable storage. Raises OSError."""
        durable.sync_file(self.descriptor)

    def still_named(self) -> bool:
        """Whether the name that it was opened by leads to this very file."""
        try:
            return os.path.samestat(self.stat(), self.path.lstat())
        except OSError:
            return False


def descriptors(images: Iterable[OpenImage]) -> list[int]:
    """Return what a child must inherit to open these."""
    return [image.descriptor for image in images]


def named(message: str, images: Iterable[OpenImage]) -> str:
    """Replace the descriptors in a message of QEMU by the names that a user knows."""
    paths = {image.name: str(image.path) for image in images}
    return re.sub(r"/proc/self/fd/\d+", lambda found: paths.get(found[0], found[0]), message)
