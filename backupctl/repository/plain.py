# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening what lies in a repository, which somebody else may have put there."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from backupctl.errors import RepositoryError
from backupctl.repository import strict


def open_file(path: Path) -> BufferedReader:
    """Open a plain file for reading: no symbolic link, no device, no pipe that we would wait at.

    Raises OSError, RepositoryError.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Do the same, for a descriptor. flags: for reading only, or for writing too.

    Raises OSError, RepositoryError.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        refuse_shortage(path, err)
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no plain file", str(path))


def read(path: Path) -> bytes:
    """Read a small file, and no more of it than a manifest may have. Raises OSError, RepositoryError."""
    with open_file(path) as file:
        return file.read(strict.MAX_BYTES + 1)


def folders(path: Path) -> list[str]:
    """Name the folders in a folder, if there is one; symbolic links are none. Raises RepositoryError."""
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as err:
        raise RepositoryError(f"{path} can't be read: {err.strerror}") from err


def refuse_shortage(path: Path, err: OSError) -> None:
    """Raise RepositoryError if nothing more can be opened: that tells nothing of what is stored."""
    if err.errno in (errno.EMFILE, errno.ENFILE):
        raise RepositoryError(f"{path} can't be opened: {err.strerror}") from err
