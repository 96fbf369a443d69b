# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes to records of clusters."""

import numpy as np
from blake3 import blake3

from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES, Records

DIGEST_BYTES = 16
_ZEROES = bytes(CLUSTER_BYTES)


def of_piece(offset: int, content: memoryview) -> Records:
    """Return the records of the clusters in a buffer that starts at a cluster boundary.

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
    # As bytes: a memoryview is compared item by item, which for zeroes takes seven times as long as hashing.
    if cluster[0] == 0 and cluster.tobytes() == _ZEROES[missing:]:
        return bytes(DIGEST_BYTES)
    hasher = blake3(cluster)
    if missing:
        hasher.update(_ZEROES[:missing])
    return bytes(hasher.digest(DIGEST_BYTES))
