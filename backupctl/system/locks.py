# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks of files and directories: flock, which the kernel releases when the holder's process ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backupctl.errors import Locked, RepositoryError, RepositoryUnreadable


def acquire(descriptor: int, patience_seconds: float, *, shared: bool = False) -> bool:
    """Lock an open file or directory; False if others held it all that time. Raises OSError."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def take(descriptor: int, patience_seconds: float, *, shared: bool = False) -> bool:
    """Lock a file or directory of a repository as `acquire` does. Raises RepositoryError."""
    try:
        return acquire(descriptor, patience_seconds, shared=shared)
    except OSError as err:
        raise RepositoryError(f"cannot lock the repository: {err.strerror}") from err


def taker(descriptor: int) -> int | None:
    """Return the process that took the lock of an open file, if it is alive; None if that is not known.

    A process that has inherited the lock is not the one that took it (proc_locks(5)).
    """
    found = os.fstat(descriptor)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    # 1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF
    held = (line.split()[1:6] for line in lines if "->" not in line)
    return next(
        (
            int(words[3])
            for words in held
            if words[:1] == ["FLOCK"] and words[4:] == [place] and int(words[3]) > 0
        ),
        None,
    )


@contextmanager
def directory(path: Path, patience_seconds: float, *, shared: bool = False) -> Iterator[None]:
    """Lock a directory for as long as the block lasts. Raises Locked, FileNotFoundError, RepositoryError.

    Some network file systems cannot lock directories. There, a reader goes on without a shared lock: nobody
    can have the exclusive one either, so nothing is changed under the reader.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as err:
        raise RepositoryUnreadable(f"cannot open {path}: {err.strerror}") from err
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
