# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter of a backup: leaves out what the layers below hold, and collects the records of the rest."""

import threading

from backupctl.digests import clusters
from backupctl.digests.clusters import EffectiveContent, Records
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

    def __call__(self, found: Records) -> Wanted:
        """Return what is to be written of some clusters, by their records. Raises WriteFailed."""
        new = clusters.differ(found, self._below.of(found["cluster"]))
        if new.all():
            self._table.add(found)
        else:
            self._table.add(found[new])
            with self._lock:
                unchanged = found["cluster"][~new]
                self.unchanged_bytes += clusters.bytes_of(unchanged, self._below.size_bytes)
        zero = clusters.is_zero(found)
        return Wanted(new & ~zero, new & zero)
