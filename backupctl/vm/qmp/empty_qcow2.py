# SPDX-License-Identifier: GPL-2.0-or-later
"""An empty qcow2 image, as `qemu-img create` makes it, without starting a process for it.

::

    0     header: version 3, clusters of 64 KiB, no features, no backing file
    1     reference count table, which names one block
    2     reference count block: 1 for every cluster of the file
    3...  L1 table, all zeroes

Source: docs/interop/qcow2.txt in QEMU's tree.
"""

import os
import struct

from backupctl.errors import Failed
from backupctl.images.qcow2_limits import MOST_L1_ENTRIES, TABLE_ENTRIES, pieces
from backupctl.sizes import CLUSTER_BYTES

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_CLUSTER_BITS, _SIXTEEN_BITS = 16, 4


def write(descriptor: int, size_bytes: int) -> None:
    """Write an image of that virtual size into an empty file. Raises OSError, Failed if it is too large."""
    l1_entries = max(1, pieces(size_bytes, CLUSTER_BYTES * TABLE_ENTRIES))
    l1_clusters = pieces(l1_entries, TABLE_ENTRIES)
    if l1_entries > MOST_L1_ENTRIES:
        raise Failed(f"a qcow2 image cannot have {size_bytes} bytes")
    clusters = 3 + l1_clusters
    os.ftruncate(descriptor, clusters * CLUSTER_BYTES)
    header = _HEADER.pack(
        *(b"QFI\xfb", 3),
        *(0, 0),  # no backing file
        _CLUSTER_BITS,
        size_bytes,
        0,  # not encrypted
        *(l1_entries, 3 * CLUSTER_BYTES),
        *(1 * CLUSTER_BYTES, 1),  # reference count table, and how many clusters it has
        *(0, 0),  # no snapshots
        *(0, 0, 0),  # no features
        _SIXTEEN_BITS,
        _HEADER.size,
    )
    _write(descriptor, header + bytes(8), 0)  # the end of the header's extensions
    _write(descriptor, struct.pack(">Q", 2 * CLUSTER_BYTES), 1 * CLUSTER_BYTES)
    _write(descriptor, struct.pack(">H", 1) * clusters, 2 * CLUSTER_BYTES)


def _write(descriptor: int, content: bytes, offset: int) -> None:
    if os.pwrite(descriptor, content, offset) != len(content):
        raise Failed("a scratch file could be written in part only")
