# SPDX-License-Identifier: GPL-2.0-or-later
"""What a layer stores, by its own tables, beside what its digest map names.

A copy of the repository may have holes where the original has zeroes (`cp --sparse=always`, `fallocate -d`).
A cluster reads as zeroes if its entry says so, or if all of it lies in a hole of the file.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, Clusters, Records
from backupctl.images.layered_image import WINDOW_CLUSTERS, LayeredImage
from backupctl.transfer.batch import BATCH_CLUSTERS, Part

_NONE: Clusters = np.empty(0, np.uint64)
_RECORDS_AT_ONCE = 1 << 16


@dataclass
class Difference:
    """Clusters in which a layer and its digest map differ; each list is ascending.

    missing: named, but not stored. unnamed: stored, but not named. zeroed: named as data, but zeroes. lost:
    named, but its entry is damaged. blocks: of `BATCH_CLUSTERS` each, those with data to read.
    """

    missing: list[Clusters] = field(default_factory=list)
    unnamed: list[Clusters] = field(default_factory=list)
    zeroed: list[Clusters] = field(default_factory=list)
    lost: list[Clusters] = field(default_factory=list)
    blocks: list[Clusters] = field(default_factory=list)
    data_clusters: int = 0


@dataclass(frozen=True)
class _Window:
    """Some neighbours: for each cluster what the layer stores, and what the map names."""

    first: int
    offset: NDArray[np.uint64]
    stored: NDArray[np.bool_]
    lost: NDArray[np.bool_]
    zero: NDArray[np.bool_]
    named: NDArray[np.bool_]
    named_zero: NDArray[np.bool_]

    @property
    def data(self) -> NDArray[np.bool_]:
        """What is to be read."""
        return self.stored & self.named & ~self.zero & ~self.lost

    def numbers(self, chosen: NDArray[np.bool_]) -> Clusters:
        """Return the numbers of the chosen clusters."""
        return np.flatnonzero(chosen).astype(np.uint64) + np.uint64(self.first)


@dataclass(frozen=True)
class Stored:
    """A layer and its digest map. disk: the layer alone. holes: of its file, as `files.holes` returns them.

    check: called for each window, may raise to cancel.
    """

    disk: LayeredImage
    records: Records
    holes: Sequence[int]
    check: Callable[[], None]

    def compare(self) -> Difference:
        """Compare which clusters both have, without reading data. Raises RepositoryUnreadable."""
        found = Difference()
        for each in self._windows():
            for into, wrong in (
                (found.missing, each.named & ~each.stored),
                (found.unnamed, each.stored & ~each.named),
                (found.zeroed, each.zero & each.named & ~each.named_zero),
                (found.lost, each.lost & each.named),
            ):
                if wrong.any():
                    into.append(each.numbers(wrong))
            data = each.numbers(each.data)
            if len(data):
                found.data_clusters += len(data)
                found.blocks.append(np.unique(data // np.uint64(BATCH_CLUSTERS)))
        return found

    def data(self, blocks: Clusters | None) -> Iterator[Part]:
        """Yield the data to read, a window at a time, in the order of the file. Raises RepositoryUnreadable.

        blocks: read only these, of `Difference.blocks`; None: all.
        """
        for each in self._windows():
            chosen = np.flatnonzero(each.data)
            if blocks is not None:
                block = (chosen + each.first) // BATCH_CLUSTERS
                chosen = chosen[np.isin(block, blocks.astype(np.intp))]
            chosen = chosen[np.argsort(each.offset[chosen], kind="stable")]
            whole = len(chosen) // BATCH_CLUSTERS * BATCH_CLUSTERS
            chosen[:whole].reshape(-1, BATCH_CLUSTERS).sort(axis=1)  # a batch is ascending
            chosen[whole:].sort()
            if len(chosen):
                yield Part(chosen.astype(np.uint64) + np.uint64(each.first), zero=False)

    def _windows(self) -> Iterator[_Window]:
        """Yield each window in which either has anything."""
        named = {
            index
            for first in range(0, len(self.records), _RECORDS_AT_ONCE)
            for index in np.unique(
                self.records["cluster"][first : first + _RECORDS_AT_ONCE] // WINDOW_CLUSTERS
            ).tolist()
        }
        numbers = self.records["cluster"]
        for index in sorted(named.union(self.disk.stored_windows())):
            self.check()
            first, places = index * WINDOW_CLUSTERS, self.disk.window(index)
            begin = bisect_left(numbers, first)
            part = self.records[begin : bisect_left(numbers, first + WINDOW_CLUSTERS, lo=begin)]
            at = (part["cluster"] - np.uint64(first)).astype(np.intp)
            # More than the image has clusters, if a prune was changing its size.
            count = max(len(places.offset), int(at[-1]) + 1 if len(at) else 0)
            layer, offset, lost = np.full(count, -1), np.zeros(count, np.uint64), np.zeros(count, np.bool_)
            for all_of, found in ((layer, places.layer), (offset, places.offset), (lost, places.lost)):
                all_of[: len(found)] = found
            is_named, named_zero = np.zeros((2, count), np.bool_)
            is_named[at], named_zero[at] = True, clusters.is_zero(part)
            stored = layer >= 0
            zero = stored & ~lost & ((offset == 0) | self._in_hole(offset))
            yield _Window(first, offset, stored, lost, zero, is_named, named_zero)

    def _in_hole(self, offset: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each place in the file whether a whole cluster there is a hole."""
        bounds = np.array(self.holes, np.int64).reshape(-1, 2)
        if not len(bounds):
            return np.zeros(len(offset), np.bool_)
        begin = offset.astype(np.int64)
        hole = np.searchsorted(bounds[:, 0], begin, side="right") - 1
        return np.asarray((hole >= 0) & (begin + CLUSTER_BYTES <= bounds[hole, 1]))


def joined(parts: list[Clusters]) -> Clusters:
    """Return all clusters of some lists."""
    return np.concatenate([_NONE, *parts])
