# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter of a backup: computes digests, and leaves out what the layers below hold already."""

import threading

from backupctl.digests import clusters, hashing
from backupctl.digests.clusters import Clusters, EffectiveContent
from backupctl.digests.record_table import RecordTable
from backupctl.transfer.copy import Wanted


class DedupFilter:
    """A filter for `Copy` that lets only new content pass, and records its digests.

    below: what the layers below hold; a cluster with the same content need not be stored again.
    """

    def __init__(self, below: EffectiveContent, table: RecordTable) -> None:
        self._below = below
        self._table = table
        self._lock = threading.Lock()
        self.unchanged_bytes = 0

    def __call__(self, numbers: Clusters, content: memoryview | None) -> Wanted:
        """Return what of a batch is to be written; content: None if it is known to be zeroes.

        Raises WriteFailed.
        """
        found = hashing.of_zeroes(numbers) if content is None else hashing.of_clusters(numbers, content)
        new = clusters.differ(found, self._below.of(numbers))
        if new.all():
            self._table.add(found)
        else:
            self._table.add(found[new])
            with self._lock:
                self.unchanged_bytes += clusters.bytes_of(numbers[~new], self._below.size_bytes)
        zero = clusters.is_zero(found)
        return Wanted(new & ~zero, new & zero)
