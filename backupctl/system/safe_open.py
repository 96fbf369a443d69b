# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening and reading files of a repository, which somebody else may have put there.

Two reasons why a file cannot be read are kept apart. If it does not exist, or is a symbolic link, a pipe or a
device, the repository is not as it should be: `NotThere`, and the caller knows whether that is damage. If the
operating system refuses (no rights, no memory, a disk or network error), nobody knows what is stored:
RepositoryUnreadable, which is never treated as damage.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from backupctl.errors import RepositoryUnreadable

_ANOTHER_KIND = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR)


class NotThere(Exception):
    """No regular file has that name. The text says why."""


class NotPlain(NotThere):
    """Something that is not a regular file has that name."""


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading: not a link or a device, nor a pipe, at which an open would wait.

    An OSError in the block is taken for one of reading the file. Raises NotThere, RepositoryUnreadable.
    """
    with unreadable(path), os.fdopen(open_descriptor(path), "rb") as file:
        yield file


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file as `open_file` does, as a descriptor. flags: O_RDONLY or O_RDWR.

    Raises NotThere, RepositoryUnreadable.
    """
    with unreadable(path):
        descriptor = _opened(path, flags)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise NotPlain("not a regular file")


def _opened(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotThere(err.strerror) from err
    except OSError as err:
        if err.errno in _ANOTHER_KIND:
            raise NotPlain("not a regular file") from err
        raise


class unreadable:  # noqa: N801 - used as a function; one made of a generator takes twice as long
    """Turn errors of the operating system in the block into RepositoryUnreadable, naming `path`.

    Raises RepositoryUnreadable.
    """

    __slots__ = ("_path",)

    def __init__(self, path: Path | str) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, err: BaseException | None, traceback: object) -> None:
        """Raise RepositoryUnreadable in place of an error of the operating system."""
        if isinstance(err, OSError | MemoryError):
            why = (isinstance(err, OSError) and err.strerror) or "not enough memory"
            raise RepositoryUnreadable(f"cannot read {self._path}: {why}") from err


def read(path: Path, most_bytes: int) -> bytes:
    """Read a file, at most one byte more than `most_bytes`, so that the caller sees if it is too large.

    Raises NotThere, RepositoryUnreadable.
    """
    with open_file(path) as file:
        # Python sets as much memory aside as is asked for.
        length = min(os.fstat(file.fileno()).st_size, most_bytes) + 1
        content = file.read(length)
        if len(content) == length:  # it has grown, or is too large
            content += file.read(most_bytes + 1 - length)
        return content


def there(path: Path) -> bool:
    """Whether something has that name. Raises RepositoryUnreadable if that cannot be found out."""
    with unreadable(path):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def directories(path: Path) -> list[str]:
    """Return the names of the directories in a directory, links not followed. Raises RepositoryUnreadable."""
    with unreadable(path):
        try:
            with os.scandir(path) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
