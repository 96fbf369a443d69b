# SPDX-License-Identifier: GPL-2.0-or-later
"""How much room files take, and how much there is."""

import os
from contextlib import suppress
from pathlib import Path


def used_bytes(descriptor: int) -> int:
    """Return how much of a file holds data; room that was only set aside counts as none."""
    used = end = 0
    with suppress(OSError):  # no data any more
        while True:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            used += end - start
    return used


def free_bytes(folder: Path) -> int:
    """Return the room that an ordinary user has on the folder's file system."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
