# SPDX-License-Identifier: GPL-2.0-or-later
"""The few steps by which anything in a repository becomes durable. All writes go through here.

A file is on disk after its own fsync AND the fsync of the folder that names it. A failed fsync is an
error for good: the kernel may have dropped the data and call a second fsync a success.
"""

import ctypes
import errno
import logging
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

_log = logging.getLogger("backupctl.system.durable")

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
_NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def sync_file(file: Path | int) -> None:
    """Bring the content of a file to the disk, by its name or its descriptor. Raises OSError."""
    if isinstance(file, int):
        _log.debug("fsync descriptor %d", file)
        os.fsync(file)
    else:
        _sync(file, os.O_RDONLY)


def sync_and_forget(path: Path) -> None:
    """Bring a file's content to the disk, and keep none in memory: what is read next is what is there.

    Raises OSError.
    """
    _sync(path, os.O_RDONLY, forget=True)


def sync_folder(path: Path) -> None:
    """Bring a folder's entries to the disk.

    Some file systems (FUSE, network) can't: then nothing in them is sure to be there after a power failure,
    and a point is not committed. Raises OSError.
    """
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        if err.errno in _NO_SYNC:
            why = "its file system can't bring a folder to the disk (fsync), so no point would be safe in it"
            raise OSError(err.errno, why, str(path)) from err
        raise


def sync_folder_if_it_can(path: Path) -> None:
    """Bring a folder's entries to the disk, if its file system can do that at all. Raises OSError."""
    try:
        sync_folder(path)
    except OSError as err:
        if err.errno not in _NO_SYNC:
            raise


def make_folder(path: Path, mode: int = 0o700) -> None:
    """Make a folder that is not there yet, and make its name durable. Raises OSError."""
    _log.debug("mkdir %s", path)
    path.mkdir(mode=mode)
    sync_folder(path.parent)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, durably, for us alone. Raises OSError."""
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            _log.debug("mkdir %s", folder)
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder.parent)


def write_new(path: Path, content: bytes, more: Iterable[memoryview] = ()) -> None:
    """Write a new file, and its content (not yet its name) to the disk. Raises OSError."""
    _log.debug("write %s, %d bytes", path, len(content))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        for part in more:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Give a file new content: after whatever death it has the old or the new. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    write_new(temporary, content)
    _log.debug("rename %s to %s", temporary, path)
    temporary.rename(path)
    sync_folder(path.parent)


def append(path: Path, kept: bytes, content: bytes) -> None:
    """Append to a file, of whose content `kept` is kept; after a death `kept` is there in any case.

    Behind it there may be part of the new content then, or anything else. A file that has a second name gets
    new content as by `replace`: that name is a copy to whoever made it. Raises OSError.
    """
    _log.debug("append to %s, %d bytes", path, len(content))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        if os.fstat(descriptor).st_nlink == 1:
            _append(file, len(kept), content)
            return
    replace(path, kept + content)


def publish(path: Path, content: bytes) -> None:
    """Write a file that nobody else makes first: it is absent or whole. Raises FileExistsError, OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        write_new(temporary, content)
        place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def place(temporary: Path, target: Path) -> None:
    """Give a complete file its name, replacing nothing; not durable before the folder is synced.

    A rename would replace what came into being meanwhile. Raises FileExistsError, OSError.
    """
    _log.debug("name %s %s", temporary, target)
    try:
        os.link(temporary, target)
    except OSError as err:
        if err.errno not in _NO_LINKS:
            raise
        _rename_to_new(temporary, target)
        return
    temporary.unlink()


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename where there are no hard links, and replace nothing. Raises FileExistsError, OSError."""
    names = os.fsencode(source), os.fsencode(target)
    done = _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE)
    number = ctypes.get_errno() if done else 0
    if number in (errno.EINVAL, errno.ENOSYS):  # the file system knows no such rename: the best there is
        number = errno.EEXIST if os.path.lexists(target) else 0
        if not number:
            source.rename(target)
    if number:
        raise OSError(number, os.strerror(number), str(target))


def rename(source: Path, target: Path) -> None:
    """Rename a folder or file within its parent, durably.

    When the parent can't be synced the name is put back, so that what isn't durable doesn't look
    committed. Raises OSError.
    """
    _log.debug("rename %s to %s", source, target)
    source.rename(target)
    try:
        sync_folder(target.parent)
    except OSError:
        target.rename(source)
        raise


def remove(path: Path) -> None:
    """Remove a file's name, durably; none is no error. Raises OSError."""
    _log.debug("remove %s", path)
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def _append(file: FileIO, end: int, content: bytes) -> None:
    try:
        file.truncate(end)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(end)  # what isn't durable must not be taken for it, nor be appended to
        raise


def _sync(path: Path, flags: int, *, forget: bool = False) -> None:
    _log.debug("fsync %s", path)
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
