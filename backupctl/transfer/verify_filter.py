# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter of a restore or merge: compares what is read back with its digests before it is written."""

from collections.abc import Callable

import numpy as np

from backupctl.digests import clusters
from backupctl.digests.clusters import EffectiveContent, Records
from backupctl.sizes import Range
from backupctl.transfer.copy import Wanted


class VerifyFilter:
    """A filter for `Copy` that compares each cluster with what the disk should hold.

    expected: None if that is not known. size_bytes: of the disk. zeroes: whether zeroes are to be written; a
    new file holds them already. on_mismatch: called in a worker with the ranges that differ; what it raises
    ends the copy.
    """

    def __init__(
        self,
        expected: EffectiveContent | None,
        on_mismatch: Callable[[list[Range]], None],
        size_bytes: int,
        *,
        zeroes: bool,
    ) -> None:
        self._expected = expected
        self._on_mismatch = on_mismatch
        self._size_bytes = size_bytes
        self._zeroes = zeroes

    def __call__(self, found: Records) -> Wanted:
        """Return what is to be written of some clusters, by their records."""
        self._compare(found)
        zero = clusters.is_zero(found)
        return Wanted(~zero, zero if self._zeroes else np.zeros(len(found), np.bool_))

    def _compare(self, found: Records) -> None:
        if self._expected is None:
            return
        wrong = found["cluster"][clusters.differ(found, self._expected.of(found["cluster"]))]
        if len(wrong):
            self._on_mismatch(clusters.ranges(wrong, self._size_bytes))
