# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes to records of clusters."""

import numpy as np
from blake3 import blake3

from backupctl.digests.clusters import CLUSTER_BYTES, RECORD, Clusters, Records

DIGEST_BYTES = 16


def _digest(cluster: memoryview | bytes) -> bytes:
    return blake3(cluster).digest(DIGEST_BYTES)


# Zeroes are recognised by their digest: a look at the bytes would cost more, and no other content has it.
_OF_ZEROES = np.frombuffer(_digest(bytes(CLUSTER_BYTES)), "<u8")


def of_clusters(numbers: Clusters, content: memoryview) -> Records:
    """Return the records of clusters whose content lies in a buffer, one behind the other, each whole."""
    found = b"".join(
        [_digest(content[at : at + CLUSTER_BYTES]) for at in range(0, len(content), CLUSTER_BYTES)]
    )
    halves = np.frombuffer(found, "<u8").reshape(-1, 2)
    records = np.empty(len(numbers), RECORD)
    records["cluster"] = numbers
    records["low"], records["high"] = halves[:, 0], halves[:, 1]
    zero = (halves[:, 0] == _OF_ZEROES[0]) & (halves[:, 1] == _OF_ZEROES[1])
    if zero.any():
        records["low"][zero] = records["high"][zero] = 0
    return records


def of_zeroes(numbers: Clusters) -> Records:
    """Return the records of clusters that are zeroes."""
    records = np.zeros(len(numbers), RECORD)
    records["cluster"] = numbers
    return records


def of_content(numbers: Clusters, content: memoryview | None) -> Records:
    """Return the records of clusters. content: as for `of_clusters`; None: they are zeroes."""
    return of_zeroes(numbers) if content is None else of_clusters(numbers, content)
