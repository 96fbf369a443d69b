# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads ext2, ext3 and ext4, with what their journal has committed.

Everything in it may have been written to do harm. So every offset is checked against the device, every walk
has an end, and what contradicts itself is an error.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache

from backupctl.errors import FilesystemError
from backupctl.filesystems import ext_journal, runs
from backupctl.filesystems.device import Device
from backupctl.filesystems.ext_blocks import BlockMap
from backupctl.filesystems.ext_format import (
    FLAG_ENCRYPTED,
    FLAG_INLINE,
    INCOMPAT_RECOVER,
    ROOT_INODE,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_OFFSET,
    Inode,
    Superblock,
)
from backupctl.filesystems.ext_journal import Replayed
from backupctl.filesystems.tree import MOST_LINK_BYTES, Node

_MOST_DIRECTORY_BYTES = 1 << 30
_SHORT_LINK_BYTES = 60
_ENTRY = struct.Struct("<IHBB")  # inode, length of the record, length of the name, kind
_LOST_JOURNAL = "its journal cannot be read, so recent changes may be missing or incomplete: {}"
_FAST_COMMITS = "fast commits of its journal are not applied: the last seconds of changes may be missing"
_INODES_KEPT = 4096


class ExtFileSystem:
    """An ext2, ext3 or ext4 file system on a device. Raises FilesystemError."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._super = Superblock.parse(device.read(SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES))
        if self._super.blocks * self._super.block_bytes > device.size:
            raise FilesystemError("damaged: it is larger than the device that it is on")
        self._replayed = Replayed()
        self._journal: list[runs.Run] = []
        self._warnings: list[str] = []
        self._inode = lru_cache(_INODES_KEPT)(self._read_inode)
        if self._super.incompat & INCOMPAT_RECOVER:
            self._replay()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be missing."""
        return tuple(self._warnings)

    def root(self) -> Node:
        """Return the root directory. Raises FilesystemError."""
        root = self._node(ROOT_INODE)
        if root.kind != "directory":
            raise FilesystemError("damaged: its root is not a directory")
        return root

    def entries(self, directory: Node) -> Iterator[tuple[bytes, Node]]:
        """Yield what is in a directory. Raises FilesystemError."""
        inode = self._inode(directory.number)
        if inode.flags & FLAG_ENCRYPTED:
            raise FilesystemError("the names in an encrypted directory cannot be read")
        for name, number in self._names(inode):
            if name not in (b".", b".."):
                yield name, self._node(number)

    def content(self, file: Node) -> Iterator[bytes | int]:
        """Yield the content of a file. Raises FilesystemError."""
        return self._content(self._inode(file.number))

    def target(self, link: Node) -> bytes:
        """Return what a link refers to. Raises FilesystemError."""
        inode = self._inode(link.number)
        if inode.size > MOST_LINK_BYTES:
            raise FilesystemError("damaged: a symbolic link is too long")
        if inode.size < _SHORT_LINK_BYTES and not inode.flags & FLAG_INLINE:
            return inode.place[: inode.size]
        return b"".join(each if isinstance(each, bytes) else bytes(each) for each in self._content(inode))

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
            unreadable="it is encrypted" if inode.flags & FLAG_ENCRYPTED else "",
        )

    def _read_inode(self, number: int) -> Inode:
        if not 0 < number <= self._super.inodes:
            raise FilesystemError(f"damaged: an entry leads to inode {number}, which does not exist")
        group, index = divmod(number - 1, self._super.inodes_per_group)
        descriptor = self._read(self._super.descriptor_offset(group), self._super.descriptor_bytes)
        table = int.from_bytes(descriptor[8:12], "little")
        if len(descriptor) >= 64:
            table |= int.from_bytes(descriptor[40:44], "little") << 32
        offset = table * self._super.block_bytes + index * self._super.inode_bytes
        return Inode(self._read(offset, self._super.inode_bytes))

    def _names(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        if inode.flags & FLAG_INLINE:
            # The number of the parent comes first, then two blocks of entries: here and in the attribute.
            data = inode.inline_data()
            yield from _parse_entries(data[4:60])
            yield from _parse_entries(data[60:])
            return
        if inode.size > _MOST_DIRECTORY_BYTES:
            raise FilesystemError("damaged: a directory is too large")
        for piece in self._content(inode):
            if isinstance(piece, int):
                continue
            for at in range(0, len(piece), self._super.block_bytes):
                yield from _parse_entries(piece[at : at + self._super.block_bytes])

    def _content(self, inode: Inode) -> Iterator[bytes | int]:
        if inode.flags & FLAG_INLINE:
            yield inode.inline_data()
            return
        blocks = BlockMap(self._super, self._read).runs(inode)
        yield from runs.content(blocks, inode.size, self._super.block_bytes, self._read)

    def _read(self, offset: int, length: int) -> bytes:
        """Read bytes of the file system, each block from the journal if that has a newer copy."""
        if not self._replayed.blocks:
            return self._device.read(offset, length)
        unit = self._super.block_bytes
        first, last = offset // unit, -(-(offset + length) // unit)
        if not any(block in self._replayed.blocks for block in range(first, last)):
            return self._device.read(offset, length)
        found = b"".join(self._block(block) for block in range(first, last))
        return found[offset - first * unit :][:length]

    def _block(self, block: int) -> bytes:
        place = self._replayed.blocks.get(block)
        if place is None:
            return self._device.read(block * self._super.block_bytes, self._super.block_bytes)
        return self._replayed.restore(block, self._journal_block(place))

    def _journal_block(self, number: int) -> bytes:
        unit = self._super.block_bytes
        for run in self._journal:
            if run.logical <= number < run.logical + run.blocks:
                return self._device.read((run.physical + number - run.logical) * unit, unit)
        raise FilesystemError("the journal is damaged: it has holes")

    def _replay(self) -> None:
        """Find out which blocks the journal has newer copies of. A damaged journal is a warning."""
        if not self._super.journal_inode:
            self._warnings.append(_LOST_JOURNAL.format("it is on another device"))
            return
        try:
            inode = self._read_inode(self._super.journal_inode)
            self._journal = list(BlockMap(self._super, self._device.read).runs(inode))
            blocks = inode.size // self._super.block_bytes
            self._replayed = ext_journal.replay(self._journal_block, self._super.block_bytes, blocks)
        except FilesystemError as err:
            self._warnings.append(_LOST_JOURNAL.format(err.message))
            return
        if self._replayed.fast_commits:
            self._warnings.append(_FAST_COMMITS)
        self._super = Superblock.parse(self._read(SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES))
        self._inode.cache_clear()


def _parse_entries(block: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield name and inode of each entry of a block. Raises FilesystemError."""
    at = 0
    while at + _ENTRY.size <= len(block):
        inode, length, name_length, _ = _ENTRY.unpack_from(block, at)
        if length in (0, 0xFFFF) and len(block) == 65536:
            length = 65536
        if length < _ENTRY.size or length % 4 or at + length > len(block):
            raise FilesystemError("damaged: a directory entry has an impossible length")
        if name_length > length - _ENTRY.size:
            raise FilesystemError("damaged: the name of a directory entry goes beyond it")
        name = block[at + _ENTRY.size : at + _ENTRY.size + name_length]
        if inode and name:
            yield name, inode
        at += length
