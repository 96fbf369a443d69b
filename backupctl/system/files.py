# SPDX-License-Identifier: GPL-2.0-or-later
"""How much space files take, and how much is free."""

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the guard imports this, and must start quickly
    from pathlib import Path


def used_bytes(descriptor: int) -> int:
    """Return how many bytes of a file hold data; space that is only preallocated does not count."""
    used = end = 0
    with suppress(OSError):  # no data any more
        while True:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            used += end - start
    return used


def free_bytes(folder: "Path") -> int:
    """Return the bytes that an ordinary user can still write to the folder's file system."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
