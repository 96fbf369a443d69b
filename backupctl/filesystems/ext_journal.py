# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal of ext3 and ext4 (jbd2): what a mount would replay, applied while reading.

A point in time without a freeze is as after a power failure: what the journal has committed counts, and the
blocks of the file system may be older. Nothing is written; the newest committed copy of a block is read from
the journal instead.

::

    | superblock | D b b b C | D b R C | D b ...      D: which blocks follow, b: their copies,
       start ----^             committed ^  ^ not     R: revoked blocks, C: the transaction is committed

Source: Linux, Documentation/filesystems/ext4/journal.rst.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from backupctl.errors import FilesystemError

_MAGIC = 0xC03B3998
_HEADER = struct.Struct(">III")  # magic, type, sequence
_DESCRIPTOR, _COMMIT, _REVOKE = 1, 2, 5
_SUPERBLOCKS = (3, 4)
_INCOMPAT_64BIT, _INCOMPAT_CSUM_V2, _INCOMPAT_CSUM_V3, _INCOMPAT_FAST = 0x2, 0x8, 0x10, 0x20
_KNOWN_INCOMPAT = 0x3F
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_MOST_BLOCKS = 1 << 20
_DEFAULT_FAST_BLOCKS = 256

ReadBlock = Callable[[int], bytes]
"""Reads a block of the journal, by its number in the journal."""


@dataclass
class Replayed:
    """What a replay would write. blocks: a block of the file system to the journal's block that holds it.

    escaped: those of them whose first four bytes were replaced. fast_commits: whether there may be fast
    commits, which are not applied.
    """

    blocks: dict[int, int] = field(default_factory=dict)
    escaped: set[int] = field(default_factory=set)
    fast_commits: bool = False

    def restore(self, block: int, content: bytes) -> bytes:
        """Return the content of a block that was read from the journal."""
        return _MAGIC.to_bytes(4, "big") + content[4:] if block in self.escaped else content


@dataclass(frozen=True)
class _Log:
    """The part of the journal that is written round and round, from block `first` to `end`."""

    read: ReadBlock
    block_bytes: int
    first: int
    end: int
    incompat: int

    def after(self, block: int, count: int = 1) -> int:
        length = self.end - self.first
        return self.first + (block - self.first + count) % length

    @property
    def tail_bytes(self) -> int:
        return 4 if self.incompat & (_INCOMPAT_CSUM_V2 | _INCOMPAT_CSUM_V3) else 0

    def tags(self, content: bytes) -> Iterator[tuple[int, int]]:
        """Yield the block of the file system and the flags of each copy that follows a descriptor."""
        wide, third = self.incompat & _INCOMPAT_64BIT, self.incompat & _INCOMPAT_CSUM_V3
        size = 16 if third else 8 + (4 if wide else 0) + (2 if self.incompat & _INCOMPAT_CSUM_V2 else 0)
        at = _HEADER.size
        while at + size <= self.block_bytes - self.tail_bytes:
            low, second = struct.unpack_from(">II", content, at)
            flags = second if third else second & 0xFFFF
            high = int.from_bytes(content[at + 8 : at + 12], "big") if wide else 0
            yield low | high << 32, flags
            at += size + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                return

    def revoked(self, content: bytes) -> Iterator[int]:
        """Yield the blocks that a revoke block names."""
        size = 8 if self.incompat & _INCOMPAT_64BIT else 4
        used = int.from_bytes(content[12:16], "big")
        for at in range(16, min(used, self.block_bytes - self.tail_bytes) - size + 1, size):
            yield int.from_bytes(content[at : at + size], "big")


def replay(read: ReadBlock, block_bytes: int, blocks: int) -> Replayed:
    """Return what a journal of `blocks` blocks would write. Raises FilesystemError."""
    header = read(0)
    magic, kind, _ = _HEADER.unpack_from(header)
    size, length, first, sequence, start = struct.unpack_from(">IIIII", header, 12)
    incompat = int.from_bytes(header[40:44], "big") if kind == _SUPERBLOCKS[1] else 0
    if magic != _MAGIC or kind not in _SUPERBLOCKS or size != block_bytes or incompat & ~_KNOWN_INCOMPAT:
        raise FilesystemError("the journal is damaged, or has features that are not supported")
    fast = 0
    if incompat & _INCOMPAT_FAST:
        fast = int.from_bytes(header[0x54:0x58], "big") or _DEFAULT_FAST_BLOCKS
    end = length - fast
    if not 0 < first < end <= min(blocks, _MOST_BLOCKS):
        raise FilesystemError("the journal is damaged: its superblock contradicts itself")
    found = Replayed(fast_commits=bool(fast))
    if start:
        if not first <= start < end:
            raise FilesystemError("the journal is damaged: it begins outside of itself")
        _apply(_Log(read, block_bytes, first, end, incompat), start, sequence, found)
    return found


@dataclass
class _Transaction:
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # block, where its copy is, flags
    revoked: set[int] = field(default_factory=set)


def _apply(log: _Log, start: int, sequence: int, found: Replayed) -> None:
    """Collect the newest copies. A revoke hides copies of its own and of earlier transactions only."""
    transactions = list(_committed(log, start, sequence))
    last_revoked: dict[int, int] = {}
    for number, one in enumerate(transactions):
        last_revoked.update(dict.fromkeys(one.revoked, number))
    for number, one in enumerate(transactions):
        for block, place, flags in one.copies:
            if last_revoked.get(block, -1) >= number:
                continue
            found.blocks[block] = place
            found.escaped.discard(block)
            if flags & _ESCAPED:
                found.escaped.add(block)


def _committed(log: _Log, start: int, sequence: int) -> Iterator[_Transaction]:
    """Yield the transactions that have a commit block, oldest first."""
    at, seen, current = start, 0, _Transaction()
    while seen < log.end - log.first:
        content = log.read(at)
        magic, kind, number = _HEADER.unpack_from(content)
        if magic != _MAGIC or number != sequence & 0xFFFFFFFF:
            return
        copies = 0
        if kind == _DESCRIPTOR:
            for block, flags in log.tags(content):
                copies += 1
                current.copies.append((block, log.after(at, copies), flags))
        elif kind == _REVOKE:
            current.revoked.update(log.revoked(content))
        elif kind == _COMMIT:
            yield current
            sequence, current = sequence + 1, _Transaction()
        else:
            return
        at, seen = log.after(at, copies + 1), seen + copies + 1
