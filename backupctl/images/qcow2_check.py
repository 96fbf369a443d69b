# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks the tables of one of our images without QEMU, and counts what `qemu-img check` counts.

Every cluster of the file is counted as often as header, tables and data use it, and the count is compared
with the reference count that is stored. Too low a count is an error: QEMU could write over the cluster. Too
high a count is a leak. Stricter than QEMU, a cluster that is used twice is an error whatever its reference
count says, and so is a compressed one: nothing that we make has either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backupctl.errors import DamageFound
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_format import (
    BLOCK_ENTRIES,
    COMPRESSED,
    COPIED,
    ENTRY,
    L1_RESERVED,
    L2_RESERVED,
    MOST_REFCOUNT_CLUSTERS,
    OFFSET,
    REFCOUNT_RESERVED,
    REFERENCES,
    TABLE_ENTRIES,
    Table,
    pieces,
)
from backupctl.images.qcow2_tables import LOST, Tables
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system import safe_open

_MOST = 255  # as far as anybody counts
_MOST_CLUSTERS = (1 << 31) - 1  # of a file that QEMU checks
_COMPARED = 1 << 20  # at once

Clusters = NDArray[np.intp]
"""Numbers of clusters of the file."""


@dataclass(frozen=True)
class Soundness:
    """What is wrong with an image's own tables. leaks: unused clusters, which are harmless."""

    errors: int
    leaks: int
    message: str


def check_tables(image: OpenImage, check: Callable[[], None] = lambda: None) -> Soundness:
    """Check a single image's tables, without those below it.

    check: called at least for each table, may raise to cancel. Memory: 32 MiB for 1 TiB of the file. Raises
    RepositoryUnreadable if the operating system refuses to read the image.
    """
    try:
        tables = Tables(image)
    except DamageFound as err:
        return Soundness(1, 0, err.message)
    header = tables.header
    if header.refcount_offset % CLUSTER_BYTES or header.refcount_clusters > MOST_REFCOUNT_CLUSTERS:
        return Soundness(1, 0, f"no table of reference counts can be at byte {header.refcount_offset}")
    if header.file_bytes > _MOST_CLUSTERS * CLUSTER_BYTES:
        return Soundness(1, 0, f"no image has {header.file_bytes} bytes")
    return _Check(tables, check).run()


class _Check:
    """One check. stored: reference counts by the image; used: how often a cluster is used."""

    def __init__(self, tables: Tables, check: Callable[[], None]) -> None:
        self.tables = tables
        self.check = check
        self.errors = 0
        self.clusters = pieces(tables.header.file_bytes, CLUSTER_BYTES)
        with safe_open.unreadable(tables.file.image.path):  # not enough memory
            self.stored = np.zeros(self.clusters + 1, np.uint8)
            self.used = np.zeros(self.clusters + 1, np.uint8)

    def run(self) -> Soundness:
        header = self.tables.header
        blocks = self._read_references()
        self._use_run(0, CLUSTER_BYTES)
        self._use_run(header.l1_offset, header.l1_entries * ENTRY.itemsize)
        l1 = self.tables.l1
        self.errors += _count(l1 == LOST)
        for index in np.flatnonzero((l1 != 0) & (l1 != LOST)).tolist():
            self._check_l2(l1[index : index + 1])
        self._use_run(header.refcount_offset, header.refcount_clusters * CLUSTER_BYTES)
        for index in range(len(blocks)):
            self._use(blocks[index : index + 1])
            self.errors += _count(self.used[blocks[index : index + 1]] != 1)
        return self._compare()

    def _read_references(self) -> Clusters:
        """Read the stored reference counts. Return the clusters that their blocks are in."""
        header, file = self.tables.header, self.tables.file
        table = file.read(header.refcount_offset, header.refcount_clusters * TABLE_ENTRIES)
        reserved, offset = table & np.uint64(REFCOUNT_RESERVED) != 0, table & ~np.uint64(REFCOUNT_RESERVED)
        there = file.begins(offset) & (offset != 0)
        self.errors += _count(reserved) + _count(~there & ~reserved & (offset != 0))
        for index in np.flatnonzero(there[: pieces(self.clusters, BLOCK_ENTRIES)]).tolist():
            self.check()
            first = index * BLOCK_ENTRIES
            found = file.read(int(offset[index]), BLOCK_ENTRIES, REFERENCES)[: self.clusters - first]
            self.stored[first : first + len(found)] = np.minimum(found, _MOST)
        return _clusters(offset[there & ~reserved])

    def _check_l2(self, entry: Table) -> None:
        """Check an entry of L1 and the table that it leads to."""
        self.check()
        file, offset = self.tables.file, entry & np.uint64(OFFSET)
        self.errors += _count(entry & np.uint64(L1_RESERVED) != 0)
        self._check_places(entry)
        if not offset[0] or not file.begins(offset)[0]:
            return
        table = file.read_table(int(offset[0]), TABLE_ENTRIES)
        senseless = (table & np.uint64(COMPRESSED) != 0) | (table == LOST)
        table = table[~senseless]
        self.errors += _count(senseless) + _count(table & np.uint64(L2_RESERVED) != 0)
        self._check_places(table[table & np.uint64(OFFSET) != 0])

    def _check_places(self, entries: Table) -> None:
        """Check where entries of L1 or L2 lead to, and count the clusters there as used."""
        offset = entries & np.uint64(OFFSET)
        outside = offset >= np.uint64(self.tables.header.file_bytes)
        unaligned = offset % np.uint64(CLUSTER_BYTES) != 0
        self.errors += _count(outside) + _count(unaligned)
        inside = _clusters(offset[~outside])
        self._use(np.concatenate([inside, inside[unaligned[~outside]] + 1]))
        once = np.zeros(len(entries), np.bool_)
        once[~outside] = self.stored[inside] == 1
        self.errors += _count(once != (entries & np.uint64(COPIED) != 0))

    def _use_run(self, offset: int, size: int) -> None:
        """Count the clusters of a table of more than one, or of the header, as used."""
        # The last cluster of a file may be short, here as in QEMU.
        if offset + size - self.tables.header.file_bytes >= CLUSTER_BYTES:
            self.errors += 1
        elif size:
            self._use(np.arange(offset // CLUSTER_BYTES, pieces(offset + size, CLUSTER_BYTES)))

    def _use(self, clusters: Clusters) -> None:
        found, times = np.unique(clusters, return_counts=True)
        self.used[found] = np.minimum(self.used[found] + times, _MOST)

    def _compare(self) -> Soundness:
        leaks = 0
        for start in range(0, len(self.used), _COMPARED):
            self.check()
            used, stored = self.used[start : start + _COMPARED], self.stored[start : start + _COMPARED]
            wrong = (used > stored) | (used > 1)
            self.errors += _count(wrong)
            leaks += _count((used < stored) & ~wrong)
        return Soundness(self.errors, leaks, f"{self.errors} errors in its tables")


def _clusters(offset: Table) -> Clusters:
    return (offset // np.uint64(CLUSTER_BYTES)).astype(np.intp)


def _count(which: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(which))
