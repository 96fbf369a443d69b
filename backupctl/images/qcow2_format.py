# SPDX-License-Identifier: GPL-2.0-or-later
"""The entries of a qcow2 image's tables (QEMU's docs/interop/qcow2.txt), for clusters of 64 KiB.

All numbers are big endian. An offset is in bytes, and 0 means that there is nothing.

::

    entry of L1, L2                      bit 63 copied: its reference count is 1    bits 55..9 offset
                  L2 only                bit 62 compressed                          bit 0      reads as zeroes
    entry of the reference count table                                              bits 63..9 offset
    reference count                      16 bits
"""

import numpy as np
from numpy.typing import NDArray

from backupctl.images.qcow2_limits import MOST_L1_ENTRIES as MOST_L1_ENTRIES  # noqa: PLC0414 - part of this
from backupctl.images.qcow2_limits import TABLE_ENTRIES as TABLE_ENTRIES  # noqa: PLC0414
from backupctl.images.qcow2_limits import pieces as pieces  # noqa: PLC0414
from backupctl.sizes import CLUSTER_BYTES

ENTRY = np.dtype(">u8")
REFERENCES = np.dtype(">u2")
BLOCK_ENTRIES = CLUSTER_BYTES // REFERENCES.itemsize
"""Clusters of the file whose reference counts are in one block."""

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = (1 << 56) - (1 << 9)
ZERO = 1

MOST_REFCOUNT_CLUSTERS = (8 << 20) // CLUSTER_BYTES
"""Nor one with a longer table of reference counts (QCOW_MAX_REFTABLE_SIZE)."""

L1_RESERVED = (1 << 63) - (1 << 56) | (1 << 9) - 1
L2_RESERVED = (1 << 62) - (1 << 56) | (1 << 9) - 2
REFCOUNT_RESERVED = (1 << 9) - 1
"""Bits that must be 0."""

Table = NDArray[np.uint64]
"""Entries of a table."""
