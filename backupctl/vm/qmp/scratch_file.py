# SPDX-License-Identifier: GPL-2.0-or-later
"""One scratch file on the machine that QEMU runs on: made, measured, emptied.

A run on another host does this there (`vm/remote/program.py`), so this imports only what loads quickly.
"""

import ctypes
import errno
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from backupctl.errors import Failed
from backupctl.vm.qmp import empty_qcow2

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP_SIZE = 1  # of fallocate(2): the size goes on telling how much is used


class Made(NamedTuple):
    """A new file. reserved: whether its space is allocated, so that nobody else can take it."""

    descriptor: int
    reserved: bool


def make(directory: Path, path: Path | None, size: int, reserve_bytes: int) -> Made:
    """Make an empty qcow2 of `size` bytes and reserve space for it. Raises Failed.

    path: its name, in a private directory; None for a file without a name in `directory`.
    """
    descriptor = _nameless(directory) if path is None else _named(path)
    try:
        _format(descriptor, size, directory)
        return Made(descriptor, _reserve(descriptor, reserve_bytes, directory))
    except BaseException:
        os.close(descriptor)
        raise


def _reserve(descriptor: int, reserve_bytes: int, directory: Path) -> bool:
    """Allocate space behind the end of a file; whether its file system can. Raises Failed."""
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    while library.fallocate(descriptor, _KEEP_SIZE, 0, reserve_bytes):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            why = os.strerror(number)
            raise Failed(
                f"{reserve_bytes >> 20} MiB cannot be reserved in the scratch directory {directory}: {why}"
            )
    return True


def _named(path: Path) -> int:
    try:
        return os.open(path, _NEW, 0o600)
    except OSError as err:
        raise Failed(f"cannot create the scratch file {path}: {err.strerror}") from err


def _nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise Failed(f"cannot create a scratch file in {directory}: {err.strerror}") from err
    try:  # a file system without O_TMPFILE: the name lives for an instant only
        descriptor, name = tempfile.mkstemp(prefix="backupctl-", dir=directory)
        Path(name).unlink()
        return descriptor
    except OSError as err:
        raise Failed(f"cannot create a scratch file in {directory}: {err.strerror}") from err


def _format(descriptor: int, size: int, directory: Path) -> None:
    try:
        empty_qcow2.write(descriptor, size)
    except OSError as err:
        raise Failed(f"cannot write a scratch file in {directory}: {err.strerror}") from err
