# SPDX-License-Identifier: GPL-2.0-or-later
"""Units and limits that several rooms must agree on.

This imports nothing: the command line needs some of them before it knows which rooms to load.
"""

CLUSTER_BYTES = 65536
"""The unit of change of everything: bitmaps, qcow2 layers, digests."""

WINDOW_CLUSTERS = 1 << 16
"""How many clusters (4 GiB of a disk) are looked at together, where all of them would take much memory."""

MAX_SIZE = 1 << 60
"""The size in bytes of the largest disk that is believed in."""

MAX_CHAIN = 180
"""Layers that a chain is given, at most. QEMU's tools follow the links by a name that grows with each of
them, 20 bytes a layer, until the system takes it no more (PATH_MAX, 4096); and the time to open a chain
grows faster than the square of its length."""

MOST_LAYERS = 500
"""Layers of a chain that are opened, at most: a chain is handed to QEMU whole, link within link, as one
argument, of which Linux takes 128 KiB (MAX_ARG_STRLEN)."""

MAX_DEFINITION_FILE_BYTES = 64 << 20
"""A file that describes a VM (its XML, its UEFI variables, a file that the user named) is not larger."""

MAX_DEFINITION_FILES = 100
"""A point holds at most so many of them."""

MAX_DEFINITION_BYTES = 256 << 20
"""All of them together: they are in memory while a run works."""

MAX_INCLUDED_FILES = 64
MAX_INCLUDED_BYTES = 160 << 20
"""Of these, the files that the user named; the rest is for what the VM itself has."""

Range = tuple[int, int]
"""Part of a disk: offset and length, in bytes."""
