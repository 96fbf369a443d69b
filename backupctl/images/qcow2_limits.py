# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits of qcow2 images (QEMU's docs/interop/qcow2.txt) for who needs no tables, and loads quickly."""

from backupctl.sizes import CLUSTER_BYTES

_ENTRY_BYTES = 8
TABLE_ENTRIES = CLUSTER_BYTES // _ENTRY_BYTES
"""Of an L2 table, and of a cluster of the L1 or the reference count table."""
MOST_L1_ENTRIES = (32 << 20) // _ENTRY_BYTES
"""QEMU opens no image with a longer L1 table (QCOW_MAX_L1_SIZE)."""


def pieces(whole: int, piece: int) -> int:
    """Return how many pieces it takes to hold a whole."""
    return -(-whole // piece)
