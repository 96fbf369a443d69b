# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a single layer back: what it stores, and the digest of every cluster of it.

The layer is served without those below it. A read error doesn't end the reading: it becomes the names
of the clusters that can't be read.

QEMU's block status speaks in bytes, and looks through the image into the file that holds it. A copy of the
repository may have holes where the original has zeroes (`cp --sparse=always`, `fallocate -d`), so that QEMU
tells of zeroes in the middle of a cluster with data. The rule: a cluster is stored as zeroes only if all of
it reads as zeroes; one that has any data is data, and is counted once.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters, hashing
from backupctl.digests.clusters import CLUSTER_BYTES, Records
from backupctl.transfer.copy import Copy
from backupctl.transfer.extents import ZERO, Extent, pieces
from backupctl.transfer.rate_limit import TokenBucket
from backupctl.transfer.source import Source

Clusters = NDArray[np.uint64]
"""Numbers of clusters, ascending."""

_OF_THE_TOP = 1  # qemu:allocation-depth, of what the served layer stores itself


def stored(source: Source) -> tuple[Clusters, Clusters]:
    """Return the clusters that a layer stores: those with any data, and those that are zeroes throughout.

    No cluster is in both, and none is in one twice. source: connected with `depth`. Raises ReadFailed.
    """
    runs: tuple[list[int], list[int]] = ([], [])
    for status in source.statuses():
        if status.flags[1] == _OF_THE_TOP:
            runs[bool(status.flags[0] & ZERO)].extend((status.offset, status.length))
    data = _numbers(runs[0])
    return data, np.setdiff1d(_numbers(runs[1]), data, assume_unique=True)


def read(
    source: Source,
    wanted: Clusters,
    look: Callable[[Records], None],
    *,
    check: Callable[[], None],
    progress: Callable[[int], None],
) -> Clusters:
    """Read clusters and show their records to `look`; returns those that can't be read.

    look: called in another thread, with the records of some neighbours at a time. check: called at least
    every 100 ms; what it raises ends the reading. progress: told the bytes done. Raises ReadFailed when the
    server is lost.
    """

    def sieve(extent: Extent, content: memoryview | None) -> Sequence[Extent]:
        assert content is not None
        look(hashing.of_piece(extent.offset, content))
        return ()

    def copy(extents: Iterable[Extent], told: Callable[[int], None]) -> list[Extent]:
        failed: list[Extent] = []
        Copy(source, (), TokenBucket(None), check, told, sieve=sieve, unreadable=failed.append).run(extents)
        return failed

    doubtful = copy(_extents(wanted, source.size), progress)
    # A request is a mebibyte; which of its clusters it was is found out one by one.
    lost = copy((one for extent in doubtful for one in pieces(extent, CLUSTER_BYTES)), lambda _done: None)
    return np.sort(np.array([extent.offset // CLUSTER_BYTES for extent in lost], np.uint64))


def _extents(wanted: Clusters, size: int) -> Iterable[Extent]:
    return (Extent(offset, length, zero=False) for offset, length in clusters.ranges(wanted, size))


def _numbers(runs: list[int]) -> Clusters:
    """Return the clusters that runs touch, each once. runs: offset, length, ... in bytes, ascending."""
    bounds = np.array(runs, np.int64).reshape(-1, 2)
    first = bounds[:, 0] // CLUSTER_BYTES
    counts = -(-bounds.sum(axis=1) // CLUSTER_BYTES) - first
    before = np.cumsum(counts) - counts
    numbers = np.repeat(first - before, counts) + np.arange(counts.sum())
    new = np.diff(numbers, prepend=-1) != 0  # two runs may touch one cluster
    found: Clusters = numbers[new].astype(np.uint64)
    return found
