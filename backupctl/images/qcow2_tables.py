# SPDX-License-Identifier: GPL-2.0-or-later
"""Where one of our images stores which cluster, read from its L1 and L2 tables without QEMU.

The tables may be damaged or made up. Nothing in them is believed but what the file can hold: an entry that
leads nowhere costs its own cluster, an L2 table that cannot be had its 8192. That an entry leads to the right
place is for the digests to show.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from backupctl.errors import DamageFound
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_format import (
    COMPRESSED,
    ENTRY,
    MOST_L1_ENTRIES,
    OFFSET,
    TABLE_ENTRIES,
    ZERO,
    Table,
    pieces,
)
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system import safe_open

LOST = 1 << 9
"""Stands for an entry that is missing: it leads nowhere, since no cluster begins there."""
_TABLES_KEPT = 2  # a chain has hundreds of layers
_NOTHING = np.zeros(0, np.uint64)


@dataclass(frozen=True)
class Window:
    """What an image's tables say of the clusters from number `first` on.

    offset: where the cluster's data begins in the file, in bytes; 0: no data is stored. What the file lacks
    behind that place (less than a cluster) is zeroes. zero: it is stored as zeroes. lost: its entry is
    damaged.
    """

    first: int
    offset: NDArray[np.uint64]
    zero: NDArray[np.bool_]
    lost: NDArray[np.bool_]


@dataclass(frozen=True)
class TableFile:
    """An image as a file that tables are read from. file_bytes: its length."""

    image: OpenImage
    file_bytes: int

    def begins(self, offset: Table) -> NDArray[np.bool_]:
        """Return for each offset whether a cluster of the file begins there."""
        aligned = (offset % np.uint64(CLUSTER_BYTES)) == 0
        return np.asarray(aligned & (offset < np.uint64(self.file_bytes)))

    def read(self, offset: int, entries: int, kind: np.dtype[np.unsignedinteger] = ENTRY) -> Table:
        """Return the entries that the file has there, fewer at its end. Raises RepositoryUnreadable."""
        # What the header says must not take more memory than the file has bytes.
        length = min(entries * kind.itemsize, max(self.file_bytes - offset, 0))
        content, done = memoryview(bytearray(length)), 0
        with safe_open.unreadable(self.image.path):
            while done < length:
                now = os.preadv(self.image.descriptor, [content[done:]], offset + done)
                if not now:
                    break
                done += now
        return np.frombuffer(content, kind, done // kind.itemsize).astype(np.uint64)

    def read_table(self, offset: int, entries: int) -> Table:
        """Read a table; entries that the file lacks are lost. Raises RepositoryUnreadable."""
        table, found = np.full(entries, LOST, np.uint64), self.read(offset, entries)
        table[: len(found)] = found
        return table


class Tables:
    """The tables of an image that is open. clusters: of the disk; the last may be short.

    Memory: the L1 table (8 bytes for 512 MiB of the disk), and a few L2 tables. All may be called by several
    threads. Raises DamageFound if QEMU would not open the image, RepositoryUnreadable.
    """

    def __init__(self, image: OpenImage) -> None:
        self.header = image.header()
        offset, entries = self.header.l1_offset, self.header.l1_entries
        if self.header.cluster != CLUSTER_BYTES:
            raise DamageFound(f"{image.path}: clusters of {self.header.cluster} bytes")
        if offset % CLUSTER_BYTES or entries > MOST_L1_ENTRIES:
            raise DamageFound(f"{image.path}: no L1 table of {entries} entries can be at byte {offset}")
        self.clusters = pieces(self.header.size, CLUSTER_BYTES)
        self.file = TableFile(image, self.header.file_bytes)
        self.l1 = self.file.read_table(offset, entries)
        # Not a method, whose cache would hold the object that holds it.
        self._l2 = lru_cache(_TABLES_KEPT)(partial(_read_l2, self.file, self.l1))

    def windows(self) -> Iterator[Window]:
        """Yield a window for each L2 table that there is, or should be. Raises RepositoryUnreadable."""
        for index in range(pieces(self.clusters, TABLE_ENTRIES)):
            if self.l1[index]:
                yield self.window(index * TABLE_ENTRIES, TABLE_ENTRIES)

    def window(self, first: int, count: int) -> Window:
        """Return what is stored of `count` clusters, or of those up to the end of the disk.

        Raises RepositoryUnreadable.
        """
        first, end = min(first, self.clusters), min(first + count, self.clusters)
        table = first // TABLE_ENTRIES
        entries = [self._l2(index) for index in range(table, pieces(end, TABLE_ENTRIES))]
        begin = table * TABLE_ENTRIES
        return self._parse(first, np.concatenate([_NOTHING, *entries])[first - begin : end - begin])

    def _parse(self, first: int, entries: Table) -> Window:
        compressed = (entries & np.uint64(COMPRESSED)) != 0
        zero = ((entries & np.uint64(ZERO)) != 0) & ~compressed
        offset = entries & np.uint64(OFFSET)
        lost = compressed | ((offset != 0) & ~zero & ~self.file.begins(offset))
        offset[zero | lost] = 0
        return Window(first, offset, zero, lost)


def _read_l2(file: TableFile, l1: Table, index: int) -> Table:
    offset = l1[index : index + 1] & np.uint64(OFFSET)
    if not offset[0]:
        return np.zeros(TABLE_ENTRIES, np.uint64)
    if not file.begins(offset)[0]:
        return np.full(TABLE_ENTRIES, LOST, np.uint64)
    return file.read_table(int(offset[0]), TABLE_ENTRIES)
