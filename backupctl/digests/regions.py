# SPDX-License-Identifier: GPL-2.0-or-later
"""Which parts of a disk a layer stores: its records, counted for each of a few equal parts."""

import numpy as np

from backupctl.digests.clusters import Records, count

_PIECE_RECORDS = 1 << 20


def columns_of(size_bytes: int, most: int) -> int:
    """Return into how many parts a disk is divided: `most`, or one for each cluster of a small disk."""
    return max(1, min(most, count(size_bytes)))


def shares(records: Records, size_bytes: int, columns: int) -> bytes:
    """Return for each part of a disk how much of it is stored: 0 for nothing, 255 for all.

    A part of which anything is stored is never 0. Records beyond the size count for nothing.
    """
    clusters = max(1, count(size_bytes))
    stored = np.zeros(columns, np.int64)
    for first in range(0, len(records), _PIECE_RECORDS):  # in pieces: 1 TiB has 16 million records
        numbers = records["cluster"][first : first + _PIECE_RECORDS]
        parts = numbers[numbers < clusters] * np.uint64(columns) // np.uint64(clusters)
        stored += np.bincount(parts.astype(np.int64), minlength=columns)
    every = np.diff(-(-np.arange(columns + 1) * clusters // columns))
    found = np.where(stored > 0, np.maximum(1, stored * 255 // np.maximum(every, 1)), 0)
    return bytes(found.astype(np.uint8))
