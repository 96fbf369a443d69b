# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own lock on an image file, taken without QEMU.

QEMU shows what it does to a file, and what it lets others do, by locks of single bytes (block/file-posix.c,
``RAW_LOCK_PERM_BASE`` and ``RAW_LOCK_SHARED_BASE``): a shared lock of byte 100 + N says "I do N", one of byte
200 + N says "nobody else may do N". Whoever begins locks its bytes first, then looks whether the opposite
bytes are locked by somebody else. The locks are those of an open file description (fcntl(2), F_OFD_SETLK), so
they go with the descriptor.

A raw image that QEMU opens read-only lets others write to it; a qcow2 never does. So a backup of a raw image
that no VM has open needs this.

`claim` is a lock of our own in the same manner, on a byte that QEMU does not use: it has a few bytes from 100
and from 200 on.
"""

import fcntl
import os
import struct

_DOES, _FORBIDS = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3  # the bits of BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE, BLK_PERM_RESIZE
_OURS = 300
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock with a 64-bit off_t


class InUse(Exception):
    """Another process has the file open in a way that does not go with this lock."""


def keep_from_writers(descriptor: int) -> None:
    """Refuse every QEMU that would write to an open file, for as long as the descriptor is open.

    Raises InUse if one does so already, or does not let others read; OSError if the file system has no locks.
    """
    for byte in (_DOES + _READ, _FORBIDS + _WRITE, _FORBIDS + _RESIZE):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
    for byte in (_FORBIDS + _READ, _DOES + _WRITE, _DOES + _RESIZE):
        if not _is_free(descriptor, byte):
            raise InUse


def claim(descriptor: int) -> bool:
    """Take the one lock of ours on an open file, for as long as the descriptor is open; whether it is free.

    It needs no right to write to the file, so users with different rights to it exclude each other. Raises
    OSError if the file system has no locks.
    """
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, _OURS))
    if _is_free(descriptor, _OURS):
        return True
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, _OURS))
    return False


def _is_free(descriptor: int, byte: int) -> bool:
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte)))
    return bool(kind == fcntl.F_UNLCK)


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
