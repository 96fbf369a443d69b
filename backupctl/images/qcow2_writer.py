# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes a qcow2 image once, from the first byte to the last, without QEMU.

::

    0     header: version 3, clusters of 64 KiB, no features, name and format of the backing file
    1     data clusters, one behind the other in the order in which they come; among them L2 tables that had
    ...   to make way for others
          the rest of the L2 tables
          L1 table
          reference count table
          reference count blocks: 1 for every cluster of the file

Only the L2 tables with an entry exist. A cluster of zeroes is an entry without a place in the file. The first
four bytes, by which a qcow2 image is known, are written when all the rest is on stable storage: whatever a
crash leaves before that is not an image, and afterwards it is whole.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Self

import numpy as np
from numpy.typing import NDArray

from backupctl.errors import WriteFailed
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_format import (
    BLOCK_ENTRIES,
    COPIED,
    ENTRY,
    MOST_L1_ENTRIES,
    OFFSET,
    REFERENCES,
    TABLE_ENTRIES,
    ZERO,
    Table,
    pieces,
)
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system.direct_io import DirectReader, DirectWriter, aligned

Clusters = NDArray[np.uint64]

_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ24xII8x")
_HEADER_BYTES = 112
_VERSION, _CLUSTER_BITS, _SIXTEEN_BITS = 3, 16, 4
_BACKING_FORMAT = struct.pack(">II5s3x", 0xE2792ACA, 5, b"qcow2")
_END_OF_EXTENSIONS = bytes(8)
_MOST_NAME_BYTES = 1023
_FIRST_BLOCK = 4096  # the least that direct I/O writes on any common disk
_TABLES_KEPT = 32  # 2 MiB, for 16 GiB of the disk
_PARTS = 16


class Qcow2Writer:
    """Makes an image in an empty file that is open for reading and writing.

    size_bytes: the virtual size. backing: the backing file's name, or None; it is written down, not opened.

    `write` and `zero` may be called by several threads at once. Each takes whole clusters by their numbers in
    the disk, ascending, each cluster once (the end of a last one that is short is 0), and returns when they
    are written, not yet durable. Once a call has failed, no image comes of it any more. A call that hangs in
    the kernel does not keep `close` waiting. WriteFailed has no subject here. Memory: 2 MiB, and 1 MiB for
    each 64 TiB of the disk.

    Raises WriteFailed if no qcow2 image can be so large.
    """

    def __init__(self, image: OpenImage, size_bytes: int, backing: str | None) -> None:
        self._size_bytes = size_bytes
        self._backing = (backing or "").encode()
        self._clusters = pieces(size_bytes, CLUSTER_BYTES)
        l1_entries = max(1, pieces(self._clusters, TABLE_ENTRIES))
        if l1_entries > MOST_L1_ENTRIES or len(self._backing) > _MOST_NAME_BYTES:
            raise WriteFailed(f"a qcow2 image cannot have {size_bytes} bytes backed by {backing!r:.200}")
        self._l1_entries = l1_entries
        self._l1 = _table(pieces(l1_entries, TABLE_ENTRIES))
        self._l2: dict[int, Table] = {}  # by index in L1; the one that was used last is the last
        self._file = DirectWriter(image.descriptor)
        self._reader = DirectReader(image.descriptor)
        self._used = 1  # clusters of the file; the first is the header's
        self._writing = 0
        self._failed = False
        self._place_lock = Lock()
        self._table_lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. Without `finish` before, it is not an image."""
        self._file.close()
        self._reader.close()

    def write(self, numbers: Clusters, parts: Sequence[memoryview]) -> None:
        """Store clusters. parts: their bytes, in memory of `direct_io.aligned`. Raises WriteFailed."""
        with self._call():
            if sum(part.nbytes for part in parts) != len(numbers) * CLUSTER_BYTES:
                raise ValueError("a cluster without its bytes")
            # Only when they are written: no entry may lead to bytes whose write failed.
            self._set(numbers, self._append(parts))

    def zero(self, numbers: Clusters) -> None:
        """Store clusters of zeroes, whatever the backing file has there. Raises WriteFailed."""
        with self._call():
            self._set(numbers, None)

    def finish(self) -> None:
        """Complete the image, flush it to stable storage, and close it. All calls have ended.

        Raises WriteFailed.
        """
        with self._call():
            if self._failed or self._writing > 1:
                raise WriteFailed("not all of the image was written")
            for index in sorted(self._l2):
                self._put_away(index)
            l1_at = self._append([_bytes(self._l1)])
            table_at, table_clusters = self._append_references()
            header = self._header(l1_at, table_at, table_clusters)
            self._file.write([header], 0)
            self._file.cut(self._used * CLUSTER_BYTES)
            # All that the header leads to must be there before the header counts: a disk is free to write the
            # two in any order.
            self._file.sync()
            header[: len(_MAGIC)] = _MAGIC
            self._file.write([header[:_FIRST_BLOCK]], 0)
            self._file.sync()
            self.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._place_lock:
            self._writing += 1
        try:
            yield
        except BaseException as err:
            self._failed = True
            if isinstance(err, OSError):
                raise WriteFailed(str(err.strerror)) from err
            raise
        finally:
            with self._place_lock:
                self._writing -= 1

    def _append(self, parts: Sequence[memoryview]) -> int:
        """Write whole clusters to the end of the file. Return the number of the first one in the file."""
        count = sum(part.nbytes for part in parts) // CLUSTER_BYTES
        with self._place_lock:
            place, self._used = self._used, self._used + count
        self._file.set_aside((place + count) * CLUSTER_BYTES)
        self._file.write(parts, place * CLUSTER_BYTES)
        return place

    def _set(self, numbers: Clusters, place: int | None) -> None:
        """Set the entries of clusters, one L2 table after the other. place: of the first; None: zeroes."""
        if len(numbers) and int(numbers[-1]) >= self._clusters:
            raise ValueError("a cluster beyond the end of the disk")
        start = 0
        with self._table_lock:
            while start < len(numbers):
                index = int(numbers[start]) // TABLE_ENTRIES
                part = numbers[start : start + TABLE_ENTRIES]
                part = part[: np.searchsorted(part, np.uint64((index + 1) * TABLE_ENTRIES))]
                table, at = self._get(index), (part % np.uint64(TABLE_ENTRIES)).astype(np.intp)
                # A second entry would hide bytes that the digest map describes.
                if table[at].any() or (np.diff(at) <= 0).any():
                    raise ValueError("a cluster was given twice, or not in order")
                table[at] = ZERO if place is None else _entries(place + start, len(at))
                start += len(at)

    def _get(self, index: int) -> Table:
        """Return an L2 table, in memory."""
        table = self._l2.pop(index, None)
        if table is None:
            table = _table()
            offset = int(self._l1[index]) & OFFSET
            if offset and self._reader.read([_bytes(table)], offset) != CLUSTER_BYTES:
                raise WriteFailed("the file was cut while it was written")
            while len(self._l2) >= _TABLES_KEPT:
                self._put_away(next(iter(self._l2)))
        self._l2[index] = table
        return table

    def _put_away(self, index: int) -> None:
        """Write an L2 table that is in memory to its place in the file, and forget it."""
        table = self._l2.pop(index)
        offset = int(self._l1[index]) & OFFSET
        if offset:
            self._file.write([_bytes(table)], offset)
        else:
            self._l1[index] = COPIED | self._append([_bytes(table)]) * CLUSTER_BYTES

    def _append_references(self) -> tuple[int, int]:
        """Write the reference counts of the file, their own included. Return place and size of the table."""
        blocks, table_clusters = _reference_clusters(self._used)
        table = _table(table_clusters)
        first_block = self._used + table_clusters
        end = first_block + blocks
        table[:blocks] = _entries(first_block, blocks) & np.uint64(OFFSET)
        place = self._append([_bytes(table)])
        full, last = _block(BLOCK_ENTRIES), _block((end - 1) % BLOCK_ENTRIES + 1)
        for start in range(0, blocks - 1, _PARTS):
            self._append([full] * min(_PARTS, blocks - 1 - start))
        self._append([last])
        return place, table_clusters

    def _header(self, l1_at: int, table_at: int, table_clusters: int) -> memoryview:
        """Return the first cluster of the file, without the magic number."""
        extensions = (_BACKING_FORMAT if self._backing else b"") + _END_OF_EXTENSIONS
        fixed = _HEADER.pack(
            bytes(len(_MAGIC)),
            _VERSION,
            _HEADER_BYTES + len(extensions) if self._backing else 0,
            len(self._backing),
            _CLUSTER_BITS,
            self._size_bytes,
            0,  # not encrypted
            self._l1_entries,
            l1_at * CLUSTER_BYTES,
            table_at * CLUSTER_BYTES,
            table_clusters,
            0,  # no snapshots
            0,
            _SIXTEEN_BITS,
            _HEADER_BYTES,
        )
        header, content = aligned(CLUSTER_BYTES), fixed + extensions + self._backing
        header[: len(content)] = content
        return header


def _reference_clusters(used: int) -> tuple[int, int]:
    """Return how many reference count blocks, and clusters of their table, cover `used` clusters and them."""
    blocks = table_clusters = 0
    while True:
        wanted = pieces(used + table_clusters + blocks, BLOCK_ENTRIES)
        if wanted == blocks:
            return blocks, table_clusters
        blocks, table_clusters = wanted, pieces(wanted, TABLE_ENTRIES)


def _table(clusters: int = 1) -> Table:
    return np.frombuffer(aligned(clusters * CLUSTER_BYTES), ENTRY)


def _block(ones: int) -> memoryview:
    block = aligned(CLUSTER_BYTES)
    np.frombuffer(block, REFERENCES)[:ones] = 1
    return block


def _entries(place: int, count: int) -> Table:
    """Return entries of data clusters that lie one behind the other in the file."""
    return np.uint64(COPIED) | np.arange(place, place + count, dtype=np.uint64) * np.uint64(CLUSTER_BYTES)


def _bytes(table: Table) -> memoryview:
    return table.view(np.uint8).data
