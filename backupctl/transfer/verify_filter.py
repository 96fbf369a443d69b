# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter of a restore or merge: compares what is read back with its digests before it is written."""

from collections.abc import Callable, Sequence

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, EffectiveContent, Records
from backupctl.digests.hashing import of_piece
from backupctl.sizes import Range
from backupctl.transfer.extents import Extent


class VerifyFilter:
    """A filter for `Copy` that compares each cluster with what the disk should hold.

    expected: None if that is not known. zeroes: whether zeroes are to be written; a new file holds them
    already. on_mismatch: called with the ranges that differ; what it raises ends the copy.
    """

    def __init__(
        self, expected: EffectiveContent | None, on_mismatch: Callable[[list[Range]], None], *, zeroes: bool
    ) -> None:
        self._expected = expected
        self._on_mismatch = on_mismatch
        self._zeroes = zeroes

    def __call__(self, extent: Extent, content: memoryview | None) -> Sequence[Extent]:
        """Return what of a chunk is to be written; content: None if it is known to be zeroes."""
        first = extent.offset // CLUSTER_BYTES
        found = clusters.blank(first, clusters.count(extent.length))
        if content is not None:
            found = of_piece(extent.offset, content)
        self._compare(found, extent.end)
        zero = clusters.is_zero(found)
        wanted = [Extent(*run, False) for run in clusters.ranges(found["cluster"][~zero], extent.end)]
        if self._zeroes:
            wanted += [Extent(*run, True) for run in clusters.ranges(found["cluster"][zero], extent.end)]
        return sorted(wanted, key=lambda one: one.offset)

    def _compare(self, found: Records, end: int) -> None:
        if self._expected is None:
            return
        should = self._expected.window(int(found["cluster"][0]), len(found))
        wrong = found["cluster"][clusters.differ(found, should)]
        if len(wrong):
            self._on_mismatch(clusters.ranges(wrong, end))
