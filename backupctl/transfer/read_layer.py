# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a single layer back: what it stores, and the digest of each of its clusters.

The layer is served without those below it. A read error does not end the reading: the clusters that cannot be
read are returned.

QEMU's block status is in bytes, and looks through the image into the file that holds it. A copy of the
repository may have holes where the original has zeroes (`cp --sparse=always`, `fallocate -d`), so that QEMU
reports zeroes in the middle of a cluster with data. The rule: a cluster is stored as zeroes only if all of
it reads as zeroes; one that has any data is data, and is counted once.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters, hashing
from backupctl.digests.clusters import CLUSTER_BYTES, Records
from backupctl.transfer.copy import Copy
from backupctl.transfer.extents import ZERO, Extent, split
from backupctl.transfer.source import Source

Clusters = NDArray[np.uint64]
"""Numbers of clusters, ascending."""

_TOP_LAYER = 1  # qemu:allocation-depth of what the served layer itself stores


def stored(source: Source) -> tuple[Clusters, Clusters]:
    """Return the clusters that a layer stores: those with any data, and those that are zeroes throughout.

    No cluster is in both, and none is in one twice. source: connected with `depth`. Raises ReadFailed.
    """
    runs: tuple[list[int], list[int]] = ([], [])
    for status in source.statuses():
        if status.flags[1] == _TOP_LAYER:
            runs[bool(status.flags[0] & ZERO)].extend((status.offset, status.length))
    data = _numbers(runs[0])
    return data, np.setdiff1d(_numbers(runs[1]), data, assume_unique=True)


def read(
    source: Source,
    wanted: Clusters,
    on_records: Callable[[Records], None],
    *,
    check: Callable[[], None],
    progress: Callable[[int], None],
) -> Clusters:
    """Read clusters and pass their records to `on_records`; returns those that cannot be read.

    on_records: called in another thread, with the records of some neighbours at a time. check: called at
    least every 100 ms; what it raises ends the reading. progress: called with the bytes done. Raises
    ReadFailed when the server is lost.
    """

    def pass_nothing(extent: Extent, content: memoryview | None) -> Sequence[Extent]:
        assert content is not None
        on_records(hashing.of_piece(extent.offset, content))
        return ()

    def read_all(extents: Iterable[Extent], progress: Callable[[int], None]) -> list[Extent]:
        failed: list[Extent] = []
        Copy(
            source,
            None,
            check=check,
            progress=progress,
            filter_chunk=pass_nothing,
            on_unreadable=failed.append,
        ).run(extents)
        return failed

    failed = read_all(_extents(wanted, source.size), progress)
    # A request is up to 1 MiB: which of its clusters cannot be read is found by reading them one by one.
    lost = read_all((one for extent in failed for one in split(extent, CLUSTER_BYTES)), lambda _done: None)
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
