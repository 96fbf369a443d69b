# SPDX-License-Identifier: GPL-2.0-or-later
"""How much space files take, where they have holes, and how much space is free."""

import errno
import os
from array import array
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


def free_bytes(directory: "Path") -> int:
    """Return the bytes that an ordinary user can still write to the directory's file system."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def holes(descriptor: int) -> "array[int]":
    """Return where an open file has holes, which read as zeroes: begin, end, begin, end, ... in bytes.

    A file system that does not know calls nothing a hole. Raises OSError.
    """
    found = array("q")
    at, end = 0, os.fstat(descriptor).st_size
    while at < end:
        begin = os.lseek(descriptor, at, os.SEEK_HOLE)
        if begin >= end:
            break
        try:
            at = os.lseek(descriptor, begin, os.SEEK_DATA)
        except OSError as err:
            if err.errno != errno.ENXIO:
                raise
            at = end  # no data behind it
        found.extend((begin, at))
    return found
