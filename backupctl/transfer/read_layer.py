# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a single layer back: what it stores, and the digest of each of its clusters.

The layer is served without those below it. A read error does not end the reading: the clusters that cannot be
read are returned.

QEMU's block status is in bytes, and looks through the image into the file that holds it. A copy of the
repository may have holes where the original has zeroes (`cp --sparse=always`, `fallocate -d`), so that QEMU
reports zeroes in the middle of a cluster with data. The rule: a cluster is stored as zeroes only if all of
it reads as zeroes; one that has any data is data, and is counted once.
"""

from collections.abc import Callable

import numpy as np

from backupctl.digests import hashing
from backupctl.digests.clusters import Clusters, Records
from backupctl.transfer.batch import Part
from backupctl.transfer.cluster_map import ClusterMap
from backupctl.transfer.copy import Copy, Wanted
from backupctl.transfer.extents import ZERO
from backupctl.transfer.reader import Reader
from backupctl.transfer.source import Source

_TOP_LAYER = 1  # qemu:allocation-depth of what the served layer itself stores
_NONE: Clusters = np.empty(0, np.uint64)


def stored(source: Source) -> tuple[Clusters, Clusters]:
    """Return the clusters that a layer stores: those with any data, and those that are zeroes throughout.

    No cluster is in both, and none is in one twice. source: connected with `depth`. Raises ReadFailed.
    """
    found = ClusterMap(source.size)
    for extents in source.statuses():
        own = extents.flags[1] == _TOP_LAYER
        zero = own & ((extents.flags[0] & ZERO) != 0)
        data = own & ~zero
        found.zero(extents.offsets[zero], extents.lengths[zero])
        found.data(extents.offsets[data], extents.lengths[data])
    parts = list(found.parts())
    return (
        np.concatenate([_NONE, *(part.numbers for part in parts if not part.zero)]),
        np.concatenate([_NONE, *(part.numbers for part in parts if part.zero)]),
    )


def read(
    reader: Reader,
    wanted: Clusters,
    on_records: Callable[[Records], None],
    *,
    check: Callable[[], None],
    progress: Callable[[int], None],
) -> Clusters:
    """Read clusters and pass their records to `on_records`; returns those that cannot be read.

    on_records: called in worker threads, with the records of some clusters at a time. check: called at
    least every 100 ms; what it raises ends the reading. progress: called with the bytes done. Raises
    ReadFailed when the server is lost.
    """
    failed: list[Clusters] = [_NONE]

    def pass_nothing(numbers: Clusters, content: memoryview | None) -> Wanted:
        assert content is not None
        on_records(hashing.of_clusters(numbers, content))
        nothing = np.zeros(len(numbers), np.bool_)
        return Wanted(nothing, nothing)

    Copy(
        reader,
        None,
        check=check,
        progress=progress,
        filter_batch=pass_nothing,
        on_unreadable=failed.append,
    ).run([Part(wanted, zero=False)])
    return np.sort(np.concatenate(failed))
