# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening and reading what lies in a repository, which somebody else may have put there.

Two things that may keep a file from being read are kept apart. What the folder says of it (there is none of
that name, or it is a symbolic link, a pipe, a device) tells of the repository: `NotThere`, and the caller
knows whether that is damage. What the operating system says (no rights, no memory, an error of the disk or
of the network) tells nothing of what is stored: RepositoryUnreadable, which is never taken for damage.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from backupctl.errors import RepositoryUnreadable

_PIECE_BYTES = 1 << 20
_ANOTHER_KIND = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR)


class NotThere(Exception):
    """No plain file has that name. The text says why."""


class NotPlain(NotThere):
    """Something else has that name."""


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a plain file for reading: no symbolic link, no device, no pipe that we would wait at.

    An OSError in the block is one of reading it. Raises NotThere, RepositoryUnreadable.
    """
    with unreadable(path), os.fdopen(open_descriptor(path), "rb") as file:
        yield file


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Do the same, for a descriptor. flags: for reading only, or for writing too.

    Raises NotThere, RepositoryUnreadable.
    """
    with unreadable(path):
        descriptor = _opened(path, flags)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise NotPlain("it is no plain file")


def _opened(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotThere(err.strerror) from err
    except OSError as err:
        if err.errno in _ANOTHER_KIND:
            raise NotPlain("it is no plain file") from err
        raise


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Have every error of the operating system in the block say that `path` can't be read.

    Raises RepositoryUnreadable.
    """
    try:
        yield
    except (OSError, MemoryError) as err:
        why = (isinstance(err, OSError) and err.strerror) or "not enough memory"
        raise RepositoryUnreadable(f"{path} can't be read: {why}") from err


def read(path: Path, most_bytes: int) -> bytes:
    """Read a file, and one byte more than `most_bytes` at most: so the caller sees that it is too large.

    Raises NotThere, RepositoryUnreadable.
    """
    with open_file(path) as file:
        return file.read(most_bytes + 1)


def prove_readable(path: Path, check: Callable[[], None]) -> None:
    """Read a file from its begin to its end; a missing one is none of our business here.

    QEMU gives one error for a table that leads nowhere and for a disk that fails. What can be read from end
    to end is all there, so QEMU's complaint is of its bytes. check: called between pieces. Raises
    RepositoryUnreadable.
    """
    try:
        with open_file(path) as file:
            while file.read(_PIECE_BYTES):
                check()
    except NotThere:
        return


def there(path: Path) -> bool:
    """Whether something has that name. Raises RepositoryUnreadable if that can't be told."""
    with unreadable(path):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def folders(path: Path) -> list[str]:
    """Name the folders in a folder, if there is one; symbolic links are none. Raises RepositoryUnreadable."""
    with unreadable(path):
        try:
            with os.scandir(path) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
