# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders for sockets, which nobody else may enter and no death leaves behind for long."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backupctl.errors import Failed

_PREFIX = "bctl-"  # short: the path of a unix socket has 107 bytes
_NEW_SECONDS = 60.0  # one that is being made is not locked yet


@contextmanager
def folder() -> Iterator[Path]:
    """Make a folder of our own for a socket, locked while we live; those of the dead are removed.

    Raises Failed.
    """
    try:
        _sweep(Path(tempfile.gettempdir()))
        made = tempfile.TemporaryDirectory(prefix=_PREFIX)
    except OSError as err:
        raise Failed(f"no temporary folder can be made: {err.strerror}") from err
    with made as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(descriptor)


def _sweep(temporary: Path) -> None:
    """Remove the folders of runs that were killed: those that nobody holds any more."""
    for path in temporary.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < _NEW_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)
