# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads FAT12, FAT16 and FAT32, with long names: the partitions that firmware boots from.

Source: Microsoft, FAT: General Overview of On-Disk Format, 1.03.
"""

import calendar
import struct
from collections.abc import Iterator

from backupctl.errors import FilesystemError
from backupctl.filesystems.device import Device
from backupctl.filesystems.tree import Node

_ENTRY_BYTES = 32
_LONG_NAME, _VOLUME, _DIRECTORY = 0x0F, 0x08, 0x10
_DELETED, _END = 0xE5, 0x00
_MOST_DIRECTORY_BYTES = 32 << 20
_MOST_FAT_BYTES = 1 << 30
_ROOT = 0
_BOOT = struct.Struct("<HBHBHHxHxxxxxxxxII")  # from byte 11


class FatFileSystem:
    """A FAT file system on a device. Raises FilesystemError."""

    warnings: tuple[str, ...] = ()

    def __init__(self, device: Device) -> None:
        self._device = device
        boot = device.read(0, 512)
        sector, per_cluster, reserved, fats, entries, small, fat16, large, fat32 = _BOOT.unpack_from(boot, 11)
        sectors, fat = small or large, fat16 or fat32
        if (
            sector not in (512, 1024, 2048, 4096)
            or per_cluster not in (1, 2, 4, 8, 16, 32, 64, 128)
            or not (reserved and 0 < fats <= 4 and fat)
            or sectors * sector > device.size
        ):
            raise FilesystemError("damaged: its boot sector contradicts itself")
        self._fat = (reserved * sector, fat * sector)
        self._root = ((reserved + fats * fat) * sector, entries * _ENTRY_BYTES)
        self._data = self._root[0] + -(-self._root[1] // sector) * sector
        self._cluster_bytes = per_cluster * sector
        self._clusters = (sectors * sector - self._data) // self._cluster_bytes
        if self._clusters <= 0 or self._fat[1] > _MOST_FAT_BYTES:
            raise FilesystemError("damaged: its boot sector contradicts itself")
        self._bits = 12 if self._clusters < 4085 else 16 if self._clusters < 65525 else 32
        self._root_cluster = int.from_bytes(boot[44:48], "little") if self._bits == 32 else 0

    def root(self) -> Node:
        """Return the root directory."""
        return Node(_ROOT, "directory", 0o755)

    def entries(self, directory: Node) -> Iterator[tuple[bytes, Node]]:
        """Yield what is in a directory. Raises FilesystemError."""
        long_parts: list[bytes] = []
        for entry in self._records(directory.number):
            if entry[11] & 0x3F == _LONG_NAME:
                long_parts.insert(0, entry[1:11] + entry[14:26] + entry[28:32])
                continue
            name = _long_name(long_parts) or _short_name(entry)
            long_parts = []
            if entry[0] == _DELETED or entry[11] & _VOLUME or name in (b".", b".."):
                continue
            yield name, self._node(entry)

    def content(self, file: Node) -> Iterator[bytes | int]:
        """Yield the content of a file. Raises FilesystemError."""
        left = file.size
        for piece in self._chain(file.number, left) if left else ():
            yield piece[:left]
            left -= len(piece[:left])
            if not left:
                return
        if left:
            raise FilesystemError("damaged: a file ends before its size")

    def target(self, link: Node) -> bytes:
        """Raise FilesystemError: there are no links."""
        raise FilesystemError(f"damaged: {link.number} is not a link")

    def _node(self, entry: bytes) -> Node:
        low, size = struct.unpack_from("<HI", entry, 26)
        number = low | (int.from_bytes(entry[20:22], "little") << 16 if self._bits == 32 else 0)
        date, time = int.from_bytes(entry[24:26], "little"), int.from_bytes(entry[22:24], "little")
        if entry[11] & _DIRECTORY:
            return Node(number, "directory", 0o755, modified=_seconds(date, time))
        return Node(number, "file", 0o644, size=size, modified=_seconds(date, time))

    def _records(self, number: int) -> Iterator[bytes]:
        if number == _ROOT and self._bits != 32:
            pieces = iter([self._device.read(*self._root)])
        else:
            pieces = self._chain(number or self._root_cluster, _MOST_DIRECTORY_BYTES)
        for piece in pieces:
            for at in range(0, len(piece) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
                if piece[at] == _END:
                    return
                yield piece[at : at + _ENTRY_BYTES]

    def _chain(self, number: int, most_bytes: int) -> Iterator[bytes]:
        """Yield the clusters of a file. A chain that is longer than the file system leads back."""
        for _ in range(min(self._clusters, -(-most_bytes // self._cluster_bytes))):
            if not 2 <= number < self._clusters + 2:
                raise FilesystemError("damaged: a file leads to a cluster that does not exist")
            yield self._device.read(self._data + (number - 2) * self._cluster_bytes, self._cluster_bytes)
            number = self._next(number)
            if number >= {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}[self._bits]:
                return

    def _next(self, number: int) -> int:
        at = number * self._bits // 8
        if at + 4 > self._fat[1] + 2:
            raise FilesystemError("damaged: a file leads to a cluster that does not exist")
        found = int.from_bytes(self._device.read(self._fat[0] + at, 4), "little")
        if self._bits == 12:
            return (found >> 4 if number % 2 else found) & 0xFFF
        return found & (0xFFFF if self._bits == 16 else 0x0FFFFFFF)


def _long_name(parts: list[bytes]) -> bytes:
    if not parts:
        return b""
    text = b"".join(parts).decode("utf-16-le", "replace")
    return text.partition("\0")[0].rstrip("\uffff").encode()


def _short_name(entry: bytes) -> bytes:
    first = b"\xe5" if entry[0] == 0x05 else entry[:1]
    name, extension = (first + entry[1:8]).rstrip(), entry[8:11].rstrip()
    if entry[12] & 0x08:
        name = name.lower()
    if entry[12] & 0x10:
        extension = extension.lower()
    return (name + (b"." + extension if extension else b"")).decode("cp437").encode()


def _seconds(date: int, time: int) -> int:
    day, month, year = date & 31, date >> 5 & 15, 1980 + (date >> 9)
    if not (day and 1 <= month <= 12):
        return 0
    return calendar.timegm((year, month, day, time >> 11, time >> 5 & 63, (time & 31) * 2))
