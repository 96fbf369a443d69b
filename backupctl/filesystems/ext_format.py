# SPDX-License-Identifier: GPL-2.0-or-later
"""The superblock, group descriptors and inodes of ext2, ext3 and ext4.

Source: Linux, Documentation/filesystems/ext4/ (globals, inodes, blockmap).
"""

import struct
from dataclasses import dataclass
from typing import Self

from backupctl.errors import FilesystemError
from backupctl.filesystems.tree import Kind

SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES = 1024, 1024
MAGIC = 0xEF53
ROOT_INODE = 2

INCOMPAT_RECOVER, INCOMPAT_META_BG, INCOMPAT_64BIT = 0x4, 0x10, 0x80
INCOMPAT_KNOWN = (
    0x2  # file types in directories
    | INCOMPAT_RECOVER
    | INCOMPAT_META_BG
    | 0x40  # extents
    | INCOMPAT_64BIT
    | 0x100  # multiple mount protection
    | 0x200  # flexible groups
    | 0x400  # large extended attributes in inodes of their own
    | 0x2000  # seed of checksums
    | 0x4000  # large directories
    | 0x8000  # content in inodes
    | 0x10000  # encryption, of single directories
    | 0x20000  # names without case
)
_RO_SPARSE_SUPER, _COMPAT_SPARSE_SUPER2 = 0x1, 0x200

FLAG_ENCRYPTED, FLAG_EXTENTS, FLAG_INLINE = 0x800, 0x80000, 0x10000000
_KINDS: dict[int, Kind] = {
    0o100000: "file",
    0o040000: "directory",
    0o120000: "link",
    0o020000: "device",
    0o060000: "device",
    0o010000: "pipe",
    0o140000: "socket",
}


def kind_of(mode: int) -> Kind:
    """Return the kind of file that the mode of an inode says."""
    return _KINDS.get(mode & 0o170000, "unknown")


@dataclass(frozen=True)
class Superblock:
    """What is needed of the superblock."""

    inodes: int
    blocks: int
    block_bytes: int
    first_block: int
    blocks_per_group: int
    inodes_per_group: int
    inode_bytes: int
    descriptor_bytes: int
    compat: int
    incompat: int
    ro_compat: int
    first_meta_group: int
    journal_inode: int
    backup_groups: tuple[int, int]

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read a superblock. Raises FilesystemError if it cannot be right, or needs what we do not have."""
        number = _numbers(content)
        incompat = number(96, 4)
        if number(56, 2) != MAGIC:
            raise FilesystemError("damaged: its superblock has no magic number")
        if unknown := incompat & ~INCOMPAT_KNOWN:
            raise FilesystemError(f"it has features that are not supported (incompat {unknown:#x})")
        wide = bool(incompat & INCOMPAT_64BIT)
        found = cls(
            inodes=number(0, 4),
            blocks=number(4, 4) | (number(336, 4) << 32 if wide else 0),
            block_bytes=1024 << min(number(24, 4), 20),
            first_block=number(20, 4),
            blocks_per_group=number(32, 4),
            inodes_per_group=number(40, 4),
            inode_bytes=number(88, 2) if number(76, 4) else 128,
            descriptor_bytes=max(number(254, 2), 32) if wide else 32,
            compat=number(92, 4),
            incompat=incompat,
            ro_compat=number(100, 4),
            first_meta_group=number(260, 4),
            journal_inode=number(224, 4) if number(92, 4) & 0x4 else 0,
            backup_groups=(number(588, 4), number(592, 4)),
        )
        found._check()
        return found

    def _check(self) -> None:
        right = (
            1024 <= self.block_bytes <= 65536
            and 128 <= self.inode_bytes <= self.block_bytes
            and self.inode_bytes & (self.inode_bytes - 1) == 0
            and self.descriptor_bytes <= self.block_bytes
            and self.descriptor_bytes % 8 == 0
            and 0 < self.blocks_per_group <= 8 * 65536 * 16
            and 0 < self.inodes_per_group <= 8 * self.block_bytes
            and self.first_block in (0, 1)
            and self.first_block < self.blocks
        )
        if not right:
            raise FilesystemError("damaged: its superblock contradicts itself")

    def descriptor_offset(self, group: int) -> int:
        """Return where the descriptor of a group is, in bytes."""
        each = self.block_bytes // self.descriptor_bytes
        # The superblock is in block 1 of 1024 bytes even where the first group begins at block 0 (bigalloc).
        block = SUPERBLOCK_OFFSET // self.block_bytes + 1 + group // each
        if self.incompat & INCOMPAT_META_BG and group // each >= self.first_meta_group:
            first = group // each * each
            block = self.first_block + first * self.blocks_per_group + self._has_superblock(first)
        return block * self.block_bytes + group % each * self.descriptor_bytes

    def _has_superblock(self, group: int) -> bool:
        if self.compat & _COMPAT_SPARSE_SUPER2:
            return group == 0 or group in self.backup_groups
        if group <= 1 or not self.ro_compat & _RO_SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))


def _is_power(number: int, base: int) -> bool:
    while number > 1 and number % base == 0:
        number //= base
    return number == 1


class Inode:
    """What is needed of an inode. content: all of its bytes in the table."""

    def __init__(self, content: bytes) -> None:
        number = _numbers(content)
        self.raw = content
        self.mode = number(0, 2)
        self.kind = kind_of(self.mode)
        self.owner = number(2, 2) | number(120, 2) << 16
        self.group = number(24, 2) | number(122, 2) << 16
        self.modified = int.from_bytes(content[16:20], "little", signed=True)
        if len(content) >= 140 and number(128, 2) >= 12:  # the extra part of the time, from 136 on
            self.modified += (number(136, 4) & 3) << 32
        self.links = number(26, 2)
        self.flags = number(32, 4)
        self.size = number(4, 4) | (number(108, 4) << 32 if self.kind in ("file", "directory") else 0)
        self.sectors = number(28, 4)
        self.place = content[40:100]
        """Where its content is; or the content itself, of a short link or with FLAG_INLINE."""

    def inline_data(self) -> bytes:
        """Return content that is in the inode itself: in the place of its blocks, then in an attribute.

        Raises FilesystemError.
        """
        return (self.place + self._attribute_data())[: self.size]

    def _attribute_data(self) -> bytes:
        """Return the value of the attribute system.data (index 7, name "data"); b"" if there is none."""
        number = _numbers(self.raw)
        begin = 128 + (number(128, 2) if len(self.raw) > 130 else 0)
        if begin + 4 > len(self.raw) or number(begin, 4) != 0xEA020000:
            return b""
        first = at = begin + 4
        while at + 16 <= len(self.raw) and number(at, 4):
            length, index = self.raw[at], self.raw[at + 1]
            value, size = number(at + 2, 2), number(at + 8, 4)
            if index == 7 and self.raw[at + 16 : at + 16 + length] == b"data":
                if first + value + size > len(self.raw):
                    raise FilesystemError("damaged: content in an inode goes beyond it")
                return self.raw[first + value : first + value + size]
            at += (16 + length + 3) & ~3
        return b""


class _numbers:  # noqa: N801 - used as a function
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __call__(self, offset: int, length: int) -> int:
        return int.from_bytes(self._content[offset : offset + length], "little")


EXTENT_HEADER = struct.Struct("<HHHHI")  # magic, entries, most entries, depth, generation
EXTENT_MAGIC = 0xF30A
EXTENT_BYTES = 12
