# SPDX-License-Identifier: GPL-2.0-or-later
"""Which clusters of a disk are to be read, or are zeroes: one byte for each, however fragmented the disk is.

Dirty bitmap and allocation map are in bytes; digests and layers are in whole clusters. A cluster that is
dirty, or zero, only in part is data: it is read.
"""

from collections.abc import Iterator

import numpy as np

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.sizes import WINDOW_CLUSTERS
from backupctl.transfer.extents import ZERO, Extent
from backupctl.transfer.source import Source

_NOTHING, _DATA, _ZERO = 0, 1, 2


def all_extents(source: Source) -> Iterator[Extent]:
    """Yield all of a source, in order: its data and its zeroes. Raises ReadFailed."""
    found = ClusterMap(source.size)
    for status in source.statuses():
        (found.zero if status.flags[0] & ZERO else found.data)(status.offset, status.length)
    return found.extents()


class ClusterMap:
    """The clusters of a disk: each not marked, marked as data, or marked as zeroes."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._kinds = np.zeros(clusters.count(size_bytes), np.uint8)

    def data(self, offset: int, length: int) -> None:
        """Mark a range to be read."""
        self._kinds[offset // CLUSTER_BYTES : clusters.count(offset + length)] = _DATA

    def zero(self, offset: int, length: int) -> None:
        """Mark a range that is known to read as zeroes."""
        end = offset + length
        first = clusters.count(offset)
        stop = clusters.count(end) if end == self._size else end // CLUSTER_BYTES
        if first * CLUSTER_BYTES != offset:
            self.data(offset, 1)
        if stop * CLUSTER_BYTES < end:
            self.data(end - 1, 1)
        inner = self._kinds[first : max(first, stop)]
        inner[inner != _DATA] = _ZERO

    def drop_unneeded_zeroes(self, below: EffectiveContent) -> None:
        """Unmark the zeroes where the layers below hold zeroes as well."""
        for first in range(0, len(self._kinds), WINDOW_CLUSTERS):
            part = self._kinds[first : first + WINDOW_CLUSTERS]
            part[(part == _ZERO) & clusters.is_zero(below.window(first, len(part)))] = _NOTHING

    def mark_differences(self, before: EffectiveContent, after: EffectiveContent) -> None:
        """Mark as data what differs between the two and is not marked yet."""
        for first in range(0, len(self._kinds), WINDOW_CLUSTERS):
            part = self._kinds[first : first + WINDOW_CLUSTERS]
            differ = clusters.differ(before.window(first, len(part)), after.window(first, len(part)))
            part[(part == _NOTHING) & differ] = _DATA

    def marked_bytes(self) -> int:
        """Return how many bytes are marked."""
        return sum(extent.length for extent in self.extents())

    def extents(self) -> Iterator[Extent]:
        """Yield what is marked, in order; a long run as several extents."""
        for first in range(0, len(self._kinds), WINDOW_CLUSTERS):
            part = self._kinds[first : first + WINDOW_CLUSTERS]
            edges = np.flatnonzero(np.diff(part)) + 1
            starts = [0, *edges.tolist()]
            for start, stop in zip(starts, [*edges.tolist(), len(part)], strict=True):
                if part[start] != _NOTHING:
                    yield self._extent(first + start, first + stop, zero=bool(part[start] == _ZERO))

    def _extent(self, first: int, stop: int, *, zero: bool) -> Extent:
        offset = first * CLUSTER_BYTES
        return Extent(offset, min(stop * CLUSTER_BYTES, self._size) - offset, zero)
