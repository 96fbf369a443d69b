# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter of a backup: computes digests, and leaves out what the layers below hold already."""

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, RECORD, EffectiveContent, Records
from backupctl.digests.hashing import of_piece
from backupctl.errors import WriteFailed
from backupctl.sizes import WINDOW_CLUSTERS
from backupctl.transfer.extents import Extent


class DedupFilter:
    """A filter for `Copy` that records the digest of each cluster, and lets only new content pass.

    below: what the layers below hold; a cluster with the same content need not be stored again. The digests
    are collected in an unnamed file in `folder` with a row for each cluster of the disk: in memory those of a
    full disk of 1 TiB would take 400 MB, and they arrive in the order in which QEMU replies.
    """

    def __init__(self, below: EffectiveContent, folder: Path | None = None) -> None:
        self._below = below
        self._passed = np.zeros(clusters.count(below.size_bytes), np.bool_)
        self._table = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` closes it
        self._lock = threading.Lock()
        self.unchanged_bytes = 0

    def __call__(self, extent: Extent, content: memoryview | None) -> Sequence[Extent]:
        """Return what of a chunk is to be written; content: None if it is known to be zeroes.

        Raises WriteFailed.
        """
        first = extent.offset // CLUSTER_BYTES
        found = clusters.blank(first, clusters.count(extent.length))
        if content is not None:
            found = of_piece(extent.offset, content)
        new = clusters.differ(found, self._below.window(first, len(found)))
        self._note(first, found, new)
        wanted = _extents(found[new], extent.end)
        with self._lock:
            self.unchanged_bytes += extent.length - sum(one.length for one in wanted)
        return wanted

    def count(self) -> int:
        """Return how many clusters passed."""
        return int(np.count_nonzero(self._passed))

    def parts(self) -> Iterator[Records]:
        """Yield the records of the clusters that passed, ascending. Raises OSError."""
        for first in range(0, len(self._passed), WINDOW_CLUSTERS):
            passed = self._passed[first : first + WINDOW_CLUSTERS]
            if np.any(passed):
                length = len(passed) * RECORD.itemsize
                content = os.pread(self._table.fileno(), length, first * RECORD.itemsize)
                yield np.frombuffer(content.ljust(length, b"\0"), RECORD)[passed]

    def close(self) -> None:
        """Free the file."""
        self._table.close()

    def _note(self, first: int, found: Records, new: NDArray[np.bool_]) -> None:
        self._passed[first : first + len(found)] = new
        try:
            written = os.pwrite(self._table.fileno(), found.tobytes(), first * RECORD.itemsize)
        except OSError as err:
            raise WriteFailed(f"cannot store the digests: {err.strerror}") from err
        if written != found.nbytes:
            raise WriteFailed("cannot store the digests: no space left on device")


def _extents(records: Records, end: int) -> list[Extent]:
    zero = clusters.is_zero(records)
    found = [
        Extent(offset, length, flag)
        for flag in (False, True)
        for offset, length in clusters.ranges(records["cluster"][zero == flag], end)
    ]
    return sorted(found, key=lambda extent: extent.offset)
