# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks of the repository's files and folders: flock, which the kernel lets go when its holder dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backupctl.errors import Locked, RepositoryError, RepositoryUnreadable


def take(descriptor: int, patience_seconds: float, *, shared: bool = False) -> bool:
    """Lock an open file or folder; whether that could be had in this time. Raises RepositoryError."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError as err:
            raise RepositoryError(f"the repository can't be locked: {err.strerror}") from err


@contextmanager
def folder(path: Path, patience_seconds: float, *, shared: bool = False) -> Iterator[None]:
    """Lock a folder for as long as the block lasts. Raises Locked, FileNotFoundError, RepositoryError.

    Where folders can't be locked (some network file systems) a shared lock is none: nobody can have the
    exclusive one either, so nothing is changed there under a reader.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as err:
        raise RepositoryUnreadable(f"{path} can't be opened: {err.strerror}") from err
    try:
        if not _taken(descriptor, patience_seconds, shared=shared):
            raise Locked(f"{path} is {'being changed by a prune' if shared else 'being read'}")
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int, patience_seconds: float, *, shared: bool) -> bool:
    try:
        return take(descriptor, patience_seconds, shared=shared)
    except RepositoryError:
        if not shared:
            raise
        return True
