# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads XFS, without its log: of a file system that was frozen all is in its place.

Source: XFS Algorithms & Data Structures, 3rd edition. Nothing that is stored is trusted.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from backupctl.errors import FilesystemError
from backupctl.filesystems import runs
from backupctl.filesystems.device import Device
from backupctl.filesystems.runs import Run
from backupctl.filesystems.tree import MOST_LINK_BYTES, Node
from backupctl.filesystems.xfs_format import BTREE, EXTENTS, LOCAL, SUPERBLOCK_BYTES, Inode, Superblock

_LEAVES_BEGIN = 32 << 30  # the place in a directory behind which it has no entries
_DATA_MAGICS = {b"XD2D": 16, b"XDD3": 64, b"XD2B": 16, b"XDB3": 64}
_SINGLE_BLOCK = (b"XD2B", b"XDB3")
_TREE_MAGICS = {b"BMAP": 24, b"BMA3": 72}
_REMOTE_LINK = b"XSLM"
_REMOTE_LINK_HEADER = 56
_EXTENT_BYTES = 16
_MOST_DEPTH = 9  # XFS_BTREE_MAXLEVELS
_UNUSED = 0xFFFF
_MOST_DIRECTORY_BYTES = 1 << 30
_INODES_KEPT = 4096
_LOG = "its log is not read: changes of the last seconds may be missing if it was not frozen"
_REPAIR = "it is marked as in need of repair"


class XfsFileSystem:
    """An XFS file system on a device. Raises FilesystemError."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._super = Superblock.parse(device.read(0, SUPERBLOCK_BYTES))
        if self._super.blocks * self._super.block_bytes > device.size:
            raise FilesystemError("damaged: it is larger than the device that it is on")
        self.warnings: tuple[str, ...] = (_LOG, _REPAIR) if self._super.needs_repair else (_LOG,)
        self._inode = lru_cache(_INODES_KEPT)(self._read_inode)

    def root(self) -> Node:
        """Return the root directory. Raises FilesystemError."""
        root = self._node(self._super.root)
        if root.kind != "directory":
            raise FilesystemError("damaged: its root is not a directory")
        return root

    def entries(self, directory: Node) -> Iterator[tuple[bytes, Node]]:
        """Yield what is in a directory. Raises FilesystemError."""
        inode = self._inode(directory.number)
        for name, number in self._short(inode) if inode.format == LOCAL else self._long(inode):
            if name not in (b".", b".."):
                yield name, self._node(number)

    def content(self, file: Node) -> Iterator[bytes | int]:
        """Yield the content of a file. Raises FilesystemError."""
        inode = self._inode(file.number)
        return runs.content(self._runs(inode), inode.size, self._super.block_bytes, self._device.read)

    def target(self, link: Node) -> bytes:
        """Return what a link refers to. Raises FilesystemError."""
        inode = self._inode(link.number)
        if inode.size > MOST_LINK_BYTES:
            raise FilesystemError("damaged: a symbolic link is too long")
        if inode.format == LOCAL:
            return inode.fork[: inode.size]
        found, unit = b"", self._super.block_bytes
        for run in self._runs(inode):
            for number in range(run.blocks):
                block = self._device.read((run.physical + number) * unit, unit)
                found += block[_REMOTE_LINK_HEADER:] if block[:4] == _REMOTE_LINK else block
                if len(found) >= inode.size:
                    return found[: inode.size]
        raise FilesystemError("damaged: a symbolic link ends before its length")

    def _node(self, number: int) -> Node:
        inode = self._inode(number)
        return Node(
            number,
            inode.kind,
            inode.mode & 0o7777,
            inode.owner,
            inode.group,
            inode.size,
            inode.modified,
            unreadable="it is on the realtime device" if inode.is_realtime else "",
        )

    def _read_inode(self, number: int) -> Inode:
        content = self._device.read(self._super.inode_offset(number), self._super.inode_bytes)
        return Inode(number, content)

    def _short(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        """Yield the entries of a directory that is in its inode."""
        data = inode.fork[: inode.size]
        if len(data) < 2:
            raise FilesystemError("damaged: a directory is too short")
        count, width = data[0] or data[1], 8 if data[1] else 4
        at, more = 2 + width, int(self._super.has_types) + width
        for _ in range(count):
            if at >= len(data) or at + 3 + data[at] + more > len(data):
                raise FilesystemError("damaged: a directory entry goes beyond its directory")
            begin, at = at + 3, at + 3 + data[at] + more
            yield data[begin : at - more], int.from_bytes(data[at - width : at], "big")

    def _long(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        """Yield the entries of a directory that has blocks of its own."""
        size = min(inode.size, _LEAVES_BEGIN)
        if size > _MOST_DIRECTORY_BYTES:
            raise FilesystemError("damaged: a directory is too large")
        rest = b""
        for piece in runs.content(self._runs(inode), size, self._super.block_bytes, self._device.read):
            rest += bytes(piece) if isinstance(piece, int) else piece
            while len(rest) >= self._super.directory_bytes:
                yield from self._block_entries(rest[: self._super.directory_bytes])
                rest = rest[self._super.directory_bytes :]

    def _block_entries(self, block: bytes) -> Iterator[tuple[bytes, int]]:
        if not any(block[:4]):
            return  # a hole
        if block[:4] not in _DATA_MAGICS:
            raise FilesystemError("damaged: a block of a directory has no magic number")
        at, end = _DATA_MAGICS[block[:4]], len(block)
        if block[:4] in _SINGLE_BLOCK:
            end -= 8 + 8 * int.from_bytes(block[-8:-4], "big")
        types = int(self._super.has_types)
        while at + 12 <= end:
            if int.from_bytes(block[at : at + 2], "big") == _UNUSED:
                length = int.from_bytes(block[at + 2 : at + 4], "big")
            else:
                length = -(-(11 + block[at + 8] + types) // 8) * 8
                if at + length > end:
                    raise FilesystemError("damaged: a directory entry goes beyond its block")
                yield block[at + 9 : at + 9 + block[at + 8]], int.from_bytes(block[at : at + 8], "big")
            if not length or length % 8:
                raise FilesystemError("damaged: a directory entry has an impossible length")
            at += length

    def _runs(self, inode: Inode) -> Iterator[Run]:
        """Yield the blocks of an inode that hold data. Raises FilesystemError if they do not ascend."""
        at = total = 0
        for logical, block, blocks, unwritten in self._extents(inode):
            total += blocks
            if not blocks or logical < at or total > self._super.blocks:
                raise FilesystemError("damaged: the blocks of a file are not where they can be")
            at = logical + blocks
            first = self._super.block(block)
            if first + blocks - 1 != self._super.block(block + blocks - 1):
                raise FilesystemError("damaged: the blocks of a file are not where they can be")
            if not unwritten:
                yield Run(logical, first, blocks)

    def _extents(self, inode: Inode) -> Iterator[tuple[int, int, int, bool]]:
        if inode.format == EXTENTS:
            if inode.extents * _EXTENT_BYTES > len(inode.fork):
                raise FilesystemError("damaged: an inode has more extents than fit into it")
            yield from _parse_extents(inode.fork, inode.extents)
        elif inode.format == BTREE:
            level, count = struct.unpack_from(">HH", inode.fork)
            most = (len(inode.fork) - 4) // 16
            if not 0 < level < _MOST_DEPTH or count > most:
                raise FilesystemError("damaged: the tree of a file contradicts itself")
            for child in struct.unpack_from(f">{count}Q", inode.fork, 4 + 8 * most):
                yield from self._tree(child, level - 1)
        else:
            raise FilesystemError("damaged: an inode has no known format")

    def _tree(self, number: int, level: int) -> Iterator[tuple[int, int, int, bool]]:
        unit = self._super.block_bytes
        block = self._device.read(self._super.block(number) * unit, unit)
        header = _TREE_MAGICS.get(block[:4], 0)
        found_level, count = struct.unpack_from(">HH", block, 4)
        most = (unit - header) // 16
        if not header or found_level != level or not 0 < count <= most:
            raise FilesystemError("damaged: the tree of a file contradicts itself")
        if level == 0:
            yield from _parse_extents(block[header:], count)
            return
        keys = struct.unpack_from(f">{count}Q", block, header)
        # Else a tree with one node many times would have no end.
        if any(later <= key for key, later in pairwise(keys)):
            raise FilesystemError("damaged: the tree of a file is not in order")
        for child in struct.unpack_from(f">{count}Q", block, header + 8 * most):
            yield from self._tree(child, level - 1)


def _parse_extents(content: bytes, count: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield first block in the file, number of the block, how many, and whether they read as zeroes."""
    for high, low in struct.iter_unpack(">QQ", content[: count * _EXTENT_BYTES]):
        logical = (high & (1 << 63) - 1) >> 9
        yield logical, (high & 0x1FF) << 43 | low >> 21, low & 0x1FFFFF, bool(high >> 63)
