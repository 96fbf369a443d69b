# SPDX-License-Identifier: GPL-2.0-or-later
"""What a disk holds, cluster by cluster, as digests: the vocabulary of copy, repository and verify.

A record is a cluster's number and the digest of its content. A layer has records for the clusters that
it stores; laid over each other, the layers of a chain give the content of a whole disk. They are numpy
arrays (mapped files, mostly): a disk of 1 TiB has 16 million clusters.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backupctl import sizes
from backupctl.sizes import Range

CLUSTER_BYTES = sizes.CLUSTER_BYTES

# Looked up together: a chain may have hundreds of layers, and a batch of the copy has only 16 clusters.
_BLOCK_CLUSTERS = 4096
_BLOCKS = 4

RECORD = np.dtype([("cluster", "<u8"), ("low", "<u8"), ("high", "<u8")])
"""A cluster's number and the two halves of its digest, which are 0 for a cluster of zeroes."""

Records = NDArray[Any]
"""Records, ascending by cluster, no cluster twice."""

Clusters = NDArray[np.uint64]
"""Numbers of clusters, ascending, none twice."""


class EffectiveContent:
    """The content of a whole disk: the records of its layers laid over each other.

    layers: records and disk's size in bytes of each, newest first. size_bytes: of the disk now. Beyond its
    own end a layer hides those below it: a disk that was shrunk and grew again has zeroes there. What no
    layer stores reads as zeroes. described_bytes: the size up to which every layer describes the disk.
    """

    def __init__(self, layers: Sequence[tuple[Records, int]], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._layers: list[tuple[Records, int]] = []
        shown = size_bytes
        for records, size in layers:
            shown = min(shown, size)
            if len(records):
                self._layers.append((records, count(shown)))
        self.described_bytes = shown
        # Bound to the layers, not to this object: a reference cycle would keep each map's file open until a
        # garbage collection.
        self._block = lru_cache(_BLOCKS)(partial(_look_up, self._layers))

    def window(self, first: int, clusters: int) -> Records:
        """Return one record for each of `clusters` clusters, from number `first` on."""
        begin = first % _BLOCK_CLUSTERS
        if begin + clusters > _BLOCK_CLUSTERS:
            return _look_up(self._layers, first, clusters)
        return self._block(first - begin, _BLOCK_CLUSTERS)[begin : begin + clusters]

    def of(self, numbers: Clusters) -> Records:
        """Return the records of some clusters."""
        first, span = int(numbers[0]), int(numbers[-1]) - int(numbers[0]) + 1
        if span == len(numbers):
            return self.window(first, span)
        if span <= sizes.WINDOW_CLUSTERS:
            return np.asarray(self.window(first, span)[numbers - numbers[0]])
        half = len(numbers) // 2
        return np.concatenate([self.of(numbers[:half]), self.of(numbers[half:])])

    def stores(self, first: int, clusters: int) -> bool:
        """Whether any layer has a record of any of `clusters` clusters, from number `first` on."""
        return any(
            len(_part(records, first, min(first + clusters, shown))) > 0 for records, shown in self._layers
        )


def _look_up(layers: Sequence[tuple[Records, int]], first: int, clusters: int) -> Records:
    found = blank(first, clusters)
    for records, shown in reversed(layers):
        part = _part(records, first, min(first + clusters, shown))
        found[part["cluster"] - first] = part
    found.setflags(write=False)  # the cache returns the same array again
    return found


def _part(records: Records, first: int, stop: int) -> Records:
    numbers = records["cluster"]
    # Not numpy's searchsorted: it would copy a column of the mapped file first.
    begin = bisect_left(numbers, first)
    return records[begin : bisect_left(numbers, stop, lo=begin)]


def count(size_bytes: int) -> int:
    """Return how many clusters a disk has; the last may be short."""
    return -(-size_bytes // CLUSTER_BYTES)


def bytes_of(numbers: Clusters, size_bytes: int) -> int:
    """Return how many bytes of a disk these clusters cover; its last one may be short."""
    if not len(numbers):
        return 0
    beyond = max(0, (int(numbers[-1]) + 1) * CLUSTER_BYTES - size_bytes)
    return len(numbers) * CLUSTER_BYTES - beyond


def blank(first: int, clusters: int) -> Records:
    """Return records of clusters that hold zeroes."""
    found = np.zeros(clusters, RECORD)
    found["cluster"] = np.arange(first, first + clusters, dtype=np.uint64)
    return found


def is_zero(records: Records) -> NDArray[np.bool_]:
    """Return for each record whether its cluster holds zeroes."""
    return np.asarray((records["low"] == 0) & (records["high"] == 0))


def differ(these: Records, those: Records) -> NDArray[np.bool_]:
    """Return for each pair of records of one cluster whether the content differs."""
    return np.asarray((these["low"] != those["low"]) | (these["high"] != those["high"]))


def overlay(lower: Records, upper: Records, size_bytes: int) -> Records:
    """Return the records of two layers merged into one: the upper wins, all beyond the size is dropped."""
    masked = np.isin(lower["cluster"], upper["cluster"], assume_unique=True)
    both = np.concatenate([lower[~masked], upper])
    both = both[both["cluster"] < count(size_bytes)]
    return both[np.argsort(both["cluster"])]


def ranges(clusters: Clusters, size_bytes: int) -> list[Range]:
    """Return (offset, length) in bytes of each run of neighbours; clusters: numbers, ascending."""
    if not len(clusters):
        return []
    edges = np.flatnonzero(np.diff(clusters) != 1) + 1
    firsts = clusters[np.concatenate([[0], edges])]
    lasts = clusters[np.concatenate([edges - 1, [len(clusters) - 1]])]
    return [
        (
            int(first) * CLUSTER_BYTES,
            min((int(last) + 1) * CLUSTER_BYTES, size_bytes) - int(first) * CLUSTER_BYTES,
        )
        for first, last in zip(firsts, lasts, strict=True)
    ]
