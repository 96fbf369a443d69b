# SPDX-License-Identifier: GPL-2.0-or-later
"""What a file system is read from: a disk, or one partition of it. Every read has bounds."""

from dataclasses import dataclass
from typing import Protocol

from backupctl.errors import FilesystemError


class Device(Protocol):
    """Bytes that can be read at any offset."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes. Raises FilesystemError beyond the end, or what the source raises."""


@dataclass(frozen=True)
class Slice:
    """A part of a device, in bytes: a partition."""

    whole: Device
    begin: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes. Raises FilesystemError beyond the end of the part."""
        check_bounds(self.size, offset, length)
        return self.whole.read(self.begin + offset, length)


def check_bounds(size: int, offset: int, length: int) -> None:
    """Refuse what is not within a device. Raises FilesystemError."""
    if offset < 0 or length < 0 or offset + length > size:
        raise FilesystemError(
            f"damaged: bytes {offset} to {offset + length} are referred to, of {size} bytes"
        )
