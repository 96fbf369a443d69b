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
SOCKET_PATH_BYTES = 107
"""The longest path of a unix socket."""
LONGEST_NAME_BYTES = len("/nbd.sock")
"""The longest name that a socket gets in such a folder, with its slash."""
FOLDER_NAME_BYTES = len(f"/{_PREFIX}12345678")
"""What such a folder adds to the path of the temporary folder."""

_NEW_SECONDS = 60.0  # one that is being made is not locked yet


@contextmanager
def folder() -> Iterator[Path]:
    """Make a folder of our own for a socket, locked while we live; those of the dead are removed.

    Raises Failed.
    """
    try:
        _sweep(Path(tempfile.gettempdir()))
        refuse_long(Path(tempfile.gettempdir()))
        made = tempfile.TemporaryDirectory(prefix=_PREFIX)
    except OSError as err:
        raise Failed(f"no temporary folder can be made: {err.strerror}") from err
    with made as name:
        descriptor = _locked(name)
        try:
            yield Path(name)
        finally:
            os.close(descriptor)


def refuse_long(temporary: Path) -> None:
    """Refuse a temporary folder whose path is too long for a socket in a folder of ours. Raises Failed."""
    length = len(os.fsencode(temporary)) + FOLDER_NAME_BYTES + LONGEST_NAME_BYTES
    if length > SOCKET_PATH_BYTES:
        raise Failed(
            f"the path of the temporary folder {temporary} is too long: a socket in it would have a path of "
            f"{length} bytes, and {SOCKET_PATH_BYTES} are allowed; set TMPDIR to a folder with a shorter path"
        )


def _locked(name: str) -> int:
    """Open a folder and lock it, or the next of us would take it for a dead one's. Raises Failed."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise Failed(f"the temporary folder {name} can't be opened: {err.strerror}") from err
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as err:
        os.close(descriptor)
        raise Failed(f"the temporary folder {name} can't be locked: {err.strerror}") from err
    return descriptor


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
