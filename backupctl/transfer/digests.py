# SPDX-License-Identifier: GPL-2.0-or-later
"""Digests of what passes through the copy, and what need not be stored because of them."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3

from backupctl import clusters
from backupctl.clusters import CLUSTER_BYTES, Logical, Records
from backupctl.transfer.extents import Extent, pieces

DIGEST_BYTES = 16
_ZEROES = bytes(CLUSTER_BYTES)
_WINDOW_BYTES = 256 << 20


def of_piece(offset: int, content: memoryview) -> Records:
    """Return the records of the clusters in a buffer that begins at a cluster's begin.

    Only the disk's last cluster may be short.
    """
    records = clusters.blank(offset // CLUSTER_BYTES, clusters.count(len(content)))
    found = b"".join(
        _digest(content[at : at + CLUSTER_BYTES]) for at in range(0, len(content), CLUSTER_BYTES)
    )
    halves = np.frombuffer(found, "<u8").reshape(-1, 2)
    records["low"], records["high"] = halves[:, 0], halves[:, 1]
    return records


def _digest(cluster: memoryview) -> bytes:
    missing = CLUSTER_BYTES - len(cluster)
    if cluster == _ZEROES[missing:]:
        return bytes(DIGEST_BYTES)
    hasher = blake3(cluster)
    if missing:
        hasher.update(_ZEROES[:missing])
    return bytes(hasher.digest(DIGEST_BYTES))


class Recorder:
    """A sieve (see `Copy`) that notes the digest of each cluster, and lets pass only what is new.

    below: what the layers below hold; a cluster that holds the same need not be stored again. Whatever
    the threads' order, `records` is sorted.
    """

    def __init__(self, below: Logical) -> None:
        self._below = below
        self._lock = threading.Lock()
        self._kept: list[Records] = []
        self.unchanged_bytes = 0

    def __call__(self, extent: Extent, content: memoryview | None) -> Sequence[Extent]:
        """Return what of a piece is to be written; content: None if it is known to be zeroes."""
        first = extent.offset // CLUSTER_BYTES
        found = clusters.blank(first, clusters.count(extent.length))
        if content is not None:
            found = of_piece(extent.offset, content)
        kept = found[clusters.differ(found, self._below.window(first, len(found)))]
        wanted = _extents(kept, extent.end)
        with self._lock:
            self._kept.append(kept)
            self.unchanged_bytes += extent.length - sum(one.length for one in wanted)
        return wanted

    def records(self) -> Records:
        """Return the records of all that was let pass."""
        every = np.concatenate([np.empty(0, clusters.RECORD), *self._kept])
        return every[np.argsort(every["cluster"])]


def vanished(extent: Extent, below: Logical) -> Iterator[Extent]:
    """Yield the parts of a range of zeroes where the layers below hold something else."""
    for piece in pieces(extent, _WINDOW_BYTES):
        held = below.window(piece.offset // CLUSTER_BYTES, clusters.count(piece.length))
        held = held[~clusters.is_zero(held)]
        for offset, length in clusters.ranges(held["cluster"], piece.end):
            yield Extent(offset, length, zero=True)


def _extents(records: Records, end: int) -> list[Extent]:
    zero = clusters.is_zero(records)
    found = [
        Extent(offset, length, flag)
        for flag in (False, True)
        for offset, length in clusters.ranges(records["cluster"][zero == flag], end)
    ]
    return sorted(found, key=lambda extent: extent.offset)
