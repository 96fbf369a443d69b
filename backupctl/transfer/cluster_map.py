# SPDX-License-Identifier: GPL-2.0-or-later
"""Which clusters of a disk are to be read, or are zeroes.

Dirty bitmap and allocation map are in bytes; digests and layers are in whole clusters. A cluster that is
dirty, or zero, only in part is data: it is read.

A map is kept in windows of 65,536 clusters (4 GiB). One that is the same throughout costs a byte, any other
two bits for each cluster: 4 MiB for 1 TiB in fragments.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent
from backupctl.sizes import WINDOW_CLUSTERS
from backupctl.transfer.batch import Part
from backupctl.transfer.extents import ZERO, Bytes
from backupctl.transfer.source import Source

_NOTHING, _DATA, _ZERO, _MIXED = 0, 1, 2, 3
_Kinds = NDArray[np.uint8]


def all_parts(source: Source) -> Iterator[Part]:
    """Yield all of a source: its data and its zeroes, a window at a time. Raises ReadFailed."""
    found = ClusterMap(source.size)
    for extents in source.statuses():
        zero = (extents.flags[0] & ZERO) != 0
        found.zero(extents.offsets[zero], extents.lengths[zero])
        found.data(extents.offsets[~zero], extents.lengths[~zero])
    return found.parts()


class ClusterMap:
    """The clusters of a disk: each not marked, marked as data, or marked as zeroes."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._clusters = clusters.count(size_bytes)
        self._kinds = np.zeros(-(-self._clusters // WINDOW_CLUSTERS), np.uint8)
        self._mixed: dict[int, tuple[_Kinds, _Kinds]] = {}
        self._open: tuple[int, _Kinds] | None = None

    def data(self, offsets: Bytes, lengths: Bytes) -> None:
        """Mark ranges to be read. They ascend and do not overlap; each has at least a byte."""
        self._mark(offsets // CLUSTER_BYTES, -(-(offsets + lengths) // CLUSTER_BYTES), _DATA)

    def zero(self, offsets: Bytes, lengths: Bytes) -> None:
        """Mark ranges that are known to read as zeroes; they are as those of `data`."""
        limits = offsets + lengths
        firsts = -(-offsets // CLUSTER_BYTES)
        stops = np.where(limits == self._size, self._clusters, limits // CLUSTER_BYTES)
        whole = firsts < stops
        self._mark(firsts[whole], stops[whole], _ZERO)
        # What has a part of a cluster only, at its begin or its end.
        for edge, cut in (
            (offsets, firsts * CLUSTER_BYTES != offsets),
            (limits - 1, stops * CLUSTER_BYTES < limits),
        ):
            touched = edge[cut] // CLUSTER_BYTES
            self._mark(touched, touched + 1, _DATA)

    def drop_unneeded_zeroes(self, below: EffectiveContent) -> None:
        """Unmark the zeroes where the layers below hold zeroes as well."""
        for index, first, count in self._windows():
            if self._kinds[index] in (_NOTHING, _DATA):
                continue
            part = self._load(index)
            if below.stores(first, count):
                part[(part == _ZERO) & clusters.is_zero(below.window(first, count))] = _NOTHING
            else:
                part[part == _ZERO] = _NOTHING

    def mark_differences(self, before: EffectiveContent, after: EffectiveContent) -> None:
        """Mark as data what differs between the two and is not marked yet."""
        for index, first, count in self._windows():
            if before.stores(first, count) or after.stores(first, count):
                part = self._load(index)
                differ = clusters.differ(before.window(first, count), after.window(first, count))
                part[(part == _NOTHING) & differ] = _DATA

    def marked_bytes(self) -> int:
        """Return how many bytes are marked."""
        found = last = 0
        for index, _, _ in self._windows():
            if self._kinds[index] != _NOTHING:
                marked = np.flatnonzero(self._load(index))
                found += len(marked)
                last = index * WINDOW_CLUSTERS + int(marked[-1])
        short = -self._size % CLUSTER_BYTES if last == self._clusters - 1 else 0
        return found * CLUSTER_BYTES - short if found else 0

    def parts(self) -> Iterator[Part]:
        """Yield what is marked, a window at a time: first its data, then its zeroes."""
        for index, first, _ in self._windows():
            if self._kinds[index] == _NOTHING:
                continue
            kinds = self._load(index)
            for kind in (_DATA, _ZERO):
                numbers = np.flatnonzero(kinds == kind)
                if len(numbers):
                    yield Part(numbers.astype(np.uint64) + np.uint64(first), kind == _ZERO)

    def _windows(self) -> Iterator[tuple[int, int, int]]:
        """Yield each window: its index, its first cluster, and how many it has."""
        self._pack()
        for index in range(len(self._kinds)):
            first = index * WINDOW_CLUSTERS
            yield index, first, min(WINDOW_CLUSTERS, self._clusters - first)

    def _mark(self, firsts: Bytes, stops: Bytes, kind: int) -> None:
        """Mark runs of clusters, ascending. Data is never overwritten."""
        if not len(firsts):
            return
        for index in range(int(firsts[0]) // WINDOW_CLUSTERS, (int(stops[-1]) - 1) // WINDOW_CLUSTERS + 1):
            base = index * WINDOW_CLUSTERS
            count = min(WINDOW_CLUSTERS, self._clusters - base)
            begin = int(np.searchsorted(stops, base, side="right"))
            end = int(np.searchsorted(firsts, base + count))
            if begin < end:
                self._mark_window(index, firsts[begin:end] - base, stops[begin:end] - base, count, kind)

    def _mark_window(self, index: int, firsts: Bytes, stops: Bytes, count: int, kind: int) -> None:
        if self._kinds[index] == _DATA or self._kinds[index] == kind:
            return
        if firsts[0] <= 0 and stops[0] >= count and (kind == _DATA or self._kinds[index] == _NOTHING):
            self._kinds[index] = kind
            self._mixed.pop(index, None)
            self._open = None if self._open and self._open[0] == index else self._open
            return
        begin, stop = max(int(firsts[0]), 0), min(int(stops[-1]), count)
        edges = np.bincount(np.maximum(firsts - begin, 0), minlength=stop - begin + 1)
        edges -= np.bincount(np.minimum(stops, count) - begin, minlength=stop - begin + 1)
        marked = np.cumsum(edges[:-1]) > 0
        kinds = self._load(index)[begin:stop]
        kinds[marked if kind == _DATA else marked & (kinds != _DATA)] = kind

    def _load(self, index: int) -> _Kinds:
        """Return a window to look at or to change, until another one is loaded."""
        if self._open and self._open[0] == index:
            return self._open[1]
        self._pack()
        count = min(WINDOW_CLUSTERS, self._clusters - index * WINDOW_CLUSTERS)
        if self._kinds[index] == _MIXED:
            data, zero = (np.unpackbits(bits, count=count) for bits in self._mixed[index])
            kinds = np.asarray(data * np.uint8(_DATA) + zero * np.uint8(_ZERO))
        else:
            kinds = np.full(count, self._kinds[index], np.uint8)
        self._open = index, kinds
        self._kinds[index] = _MIXED
        return kinds

    def _pack(self) -> None:
        """Store the window that was loaded last."""
        if self._open is None:
            return
        index, kinds = self._open
        self._open = None
        if (kinds == kinds[0]).all():
            self._kinds[index] = kinds[0]
            self._mixed.pop(index, None)
        else:
            self._mixed[index] = (np.packbits(kinds == _DATA), np.packbits(kinds == _ZERO))
