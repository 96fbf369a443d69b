# SPDX-License-Identifier: GPL-2.0-or-later
"""The superblock and the inodes of XFS, versions 4 and 5.

Source: XFS Algorithms & Data Structures, 3rd edition.
"""

from dataclasses import dataclass
from typing import Self

from backupctl.errors import FilesystemError
from backupctl.filesystems.ext_format import kind_of

SUPERBLOCK_BYTES = 512
LOCAL, EXTENTS, BTREE = 1, 2, 3
_FTYPE, _NEEDS_REPAIR = 0x1, 0x10
_KNOWN_INCOMPAT = 0xFF
_V4_FTYPE = 0x200
_FLAG_REALTIME = 0x1
_FLAG2_BIGTIME, _FLAG2_LARGE_COUNTS = 1 << 3, 1 << 4
_BIGTIME_START = -(1 << 31)
_V3_CORE, _V2_CORE = 176, 100


@dataclass(frozen=True)
class Superblock:
    """What is needed of the superblock. The `…_bits` are logarithms of numbers of the same name."""

    block_bytes: int
    blocks: int
    root: int
    group_blocks: int
    groups: int
    version: int
    inode_bytes: int
    inode_bits: int
    group_bits: int
    directory_bytes: int
    has_types: bool
    needs_repair: bool

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read a superblock. Raises FilesystemError if it cannot be right, or needs what we do not have."""

        def number(offset: int, length: int) -> int:
            return int.from_bytes(content[offset : offset + length], "big")

        version = number(100, 2) & 0xF
        incompat = number(216, 4) if version == 5 else 0
        if content[:4] != b"XFSB" or version not in (4, 5) or incompat & ~_KNOWN_INCOMPAT:
            raise FilesystemError("its version or its features are not supported")
        block = number(4, 4)
        if not 512 <= block <= 65536 or number(192, 1) > 7:
            raise FilesystemError("damaged: its superblock contradicts itself")
        found = cls(
            block_bytes=block,
            blocks=number(8, 8),
            root=number(56, 8),
            group_blocks=number(84, 4),
            groups=number(88, 4),
            version=version,
            inode_bytes=number(104, 2),
            inode_bits=number(123, 1),
            group_bits=number(124, 1),
            directory_bytes=block << number(192, 1),
            has_types=bool(incompat & _FTYPE) if version == 5 else bool(number(200, 4) & _V4_FTYPE),
            needs_repair=bool(incompat & _NEEDS_REPAIR),
        )
        found._check()
        return found

    def _check(self) -> None:
        right = (
            256 <= self.inode_bytes <= self.block_bytes
            and self.inode_bytes << self.inode_bits == self.block_bytes
            and 0 < self.group_blocks <= 1 << self.group_bits <= 1 << 31
            and self.groups > 0
            and self.directory_bytes <= 65536
            and (self.groups - 1) * self.group_blocks < self.blocks <= self.groups * self.group_blocks
        )
        if not right:
            raise FilesystemError("damaged: its superblock contradicts itself")

    def block(self, number: int) -> int:
        """Return the place of a block, counted in blocks, whose number contains its group's."""
        group, within = divmod(number, 1 << self.group_bits)
        place = group * self.group_blocks + within
        if within >= self.group_blocks or place >= self.blocks:
            raise FilesystemError(f"damaged: block {number} does not exist")
        return place

    def inode_offset(self, number: int) -> int:
        """Return where an inode is, in bytes."""
        block, index = divmod(number, 1 << self.inode_bits)
        return self.block(block) * self.block_bytes + index * self.inode_bytes


class Inode:
    """What is needed of an inode. content: all of its bytes."""

    def __init__(self, number: int, content: bytes) -> None:
        def read(offset: int, length: int) -> int:
            return int.from_bytes(content[offset : offset + length], "big")

        self.number = number
        version = read(4, 1)
        if content[:2] != b"IN" or version not in (1, 2, 3):
            raise FilesystemError(f"damaged: there is no inode {number}")
        flags2 = read(120, 8) if version == 3 else 0
        self.mode = read(2, 2)
        self.kind = kind_of(self.mode)
        self.format = read(5, 1)
        self.owner, self.group = read(8, 4), read(12, 4)
        self.size = read(56, 8)
        self.extents = read(24, 8) if flags2 & _FLAG2_LARGE_COUNTS else read(76, 4)
        self.is_realtime = bool(read(90, 2) & _FLAG_REALTIME)
        self.modified = int.from_bytes(content[40:44], "big", signed=True)
        if flags2 & _FLAG2_BIGTIME:
            self.modified = read(40, 8) // 10**9 + _BIGTIME_START
        core = _V3_CORE if version == 3 else _V2_CORE
        length = read(82, 1) * 8 or len(content) - core
        if core + length > len(content) or self.size >= 1 << 63:
            raise FilesystemError(f"damaged: inode {number} contradicts itself")
        self.fork = content[core : core + length]
