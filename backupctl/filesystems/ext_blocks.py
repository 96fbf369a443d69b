# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the content of an inode is on an ext file system: extents (ext4), or blocks of block numbers."""

import struct
from collections.abc import Callable, Iterator

from backupctl.errors import FilesystemError
from backupctl.filesystems.ext_format import (
    EXTENT_BYTES,
    EXTENT_HEADER,
    EXTENT_MAGIC,
    FLAG_EXTENTS,
    Inode,
    Superblock,
)
from backupctl.filesystems.runs import Run

_MOST_DEPTH = 5  # of extents, as Linux allows
_UNWRITTEN = 32768  # extents with more blocks are allocated, and read as zeroes
_DIRECT = 12
_EXTENT = struct.Struct("<IHHI")  # first block of the file, blocks, high and low part of the place
_INDEX = struct.Struct("<IIHH")  # first block of the file, low and high part of the place


class BlockMap:
    """Finds the content of inodes. read: reads bytes of the file system."""

    def __init__(self, superblock: Superblock, read: Callable[[int, int], bytes]) -> None:
        self._super = superblock
        self._read = read

    def runs(self, inode: Inode) -> Iterator[Run]:
        """Yield the blocks of an inode that hold data, ascending; holes are left out.

        Blocks that do not ascend, or are more than there are, are damage: a malicious tree has an end, and
        no file is larger than the file system. Raises FilesystemError.
        """
        most = -(-inode.size // self._super.block_bytes)
        found = self._extents(inode) if inode.flags & FLAG_EXTENTS else self._listed(inode, most)
        at = total = 0
        for run in found:
            total += run.blocks
            if not self._is_possible(run, at, total):
                raise FilesystemError("damaged: the blocks of a file are not where they can be")
            at = run.logical + run.blocks
            yield run

    def _is_possible(self, run: Run, at: int, total: int) -> bool:
        within = 0 < run.physical <= self._super.blocks - run.blocks
        return within and run.logical >= at and total <= self._super.blocks

    def _extents(self, inode: Inode) -> Iterator[Run]:
        return self._extent_node(inode.place, _MOST_DEPTH, exact=False)

    def _extent_node(self, node: bytes, most_depth: int, *, exact: bool) -> Iterator[Run]:
        magic, entries, _, depth, _ = EXTENT_HEADER.unpack_from(node)
        wrong_depth = depth != most_depth if exact else depth > most_depth
        if magic != EXTENT_MAGIC or wrong_depth or (entries + 1) * EXTENT_BYTES > len(node):
            raise FilesystemError("damaged: the extents of a file contradict themselves")
        last = -1
        for at in range(EXTENT_BYTES, (entries + 1) * EXTENT_BYTES, EXTENT_BYTES):
            logical = int.from_bytes(node[at : at + 4], "little")
            if logical <= last:  # else a tree with one node many times would have no end
                raise FilesystemError("damaged: the extents of a file are not in order")
            last = logical
            if depth:
                _, low, high, _ = _INDEX.unpack_from(node, at)
                yield from self._extent_node(self._block(low | high << 32), depth - 1, exact=True)
                continue
            _, count, high, low = _EXTENT.unpack_from(node, at)
            if 0 < count <= _UNWRITTEN:
                yield Run(logical, low | high << 32, count)

    def _listed(self, inode: Inode, most: int) -> Iterator[Run]:
        """Yield runs of single blocks, neighbours joined."""
        current: Run | None = None
        for logical, physical in self._numbers(inode.place, most):
            if not physical:
                continue
            if current and (logical, physical) == (
                current.logical + current.blocks,
                current.physical + current.blocks,
            ):
                current = current._replace(blocks=current.blocks + 1)
                continue
            if current:
                yield current
            current = Run(logical, physical, 1)
        if current:
            yield current

    def _numbers(self, place: bytes, most: int) -> Iterator[tuple[int, int]]:
        """Yield each block of a file and its number, 0 for a hole of one block; large holes are left out."""
        each = self._super.block_bytes // 4
        numbers = struct.unpack("<15I", place)
        for logical, physical in enumerate(numbers[: min(_DIRECT, most)]):
            yield logical, physical
        logical = _DIRECT
        for level, block in enumerate(numbers[_DIRECT:], 1):
            yield from self._indirect(block, level, logical, most)
            logical += each**level

    def _indirect(self, block: int, level: int, logical: int, most: int) -> Iterator[tuple[int, int]]:
        each = self._super.block_bytes // 4
        if not block or logical >= most:
            return
        span = each ** (level - 1)
        for index, number in enumerate(struct.unpack(f"<{each}I", self._block(block))):
            here = logical + index * span
            if here >= most:
                return
            if level == 1:
                yield here, number
            elif number:
                yield from self._indirect(number, level - 1, here, most)

    def _block(self, number: int) -> bytes:
        if not 0 < number < self._super.blocks:
            raise FilesystemError("damaged: the blocks of a file are listed outside of the file system")
        return self._read(number * self._super.block_bytes, self._super.block_bytes)
