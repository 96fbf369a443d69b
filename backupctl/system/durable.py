# SPDX-License-Identifier: GPL-2.0-or-later
"""The few steps that make a change of a repository durable. All writes go through here.

A file is durable after its own fsync and the fsync of the directory that names it. A failed fsync is never
tried again: the kernel may have dropped the data, and a second fsync may then succeed without it.
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
    """Flush the content of a file to stable storage, by its name or its descriptor. Raises OSError."""
    if isinstance(file, int):
        _log.debug("fsync descriptor %d", file)
        os.fsync(file)
    else:
        _sync(file, os.O_RDONLY)


def sync_and_forget(path: Path) -> None:
    """Flush a file's content, and drop it from the page cache: the next read is from the disk.

    Raises OSError.
    """
    _sync(path, os.O_RDONLY, forget=True)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to stable storage.

    Some file systems (FUSE, network) do not support it. Nothing in them is sure to survive a power failure,
    so no point is committed there. Raises OSError.
    """
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        if err.errno in _NO_SYNC:
            why = "its file system does not support fsync of directories, so no point would be durable in it"
            raise OSError(err.errno, why, str(path)) from err
        raise


def sync_directory_if_it_can(path: Path) -> None:
    """Flush a directory's entries, if its file system supports that. Raises OSError."""
    try:
        sync_directory(path)
    except OSError as err:
        if err.errno not in _NO_SYNC:
            raise


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Create a directory, durably. Raises FileExistsError, OSError."""
    _log.debug("mkdir %s", path)
    path.mkdir(mode=mode)
    sync_directory(path.parent)


def make_directories(path: Path) -> None:
    """Create a directory and the missing ones above it, durably, accessible to us only. Raises OSError."""
    for directory in reversed([path, *path.parents]):
        if not directory.is_dir():
            _log.debug("mkdir %s", directory)
            directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(directory.parent)


def write_new(path: Path, content: bytes, more: Iterable[memoryview] = ()) -> None:
    """Write and fsync a new file (not yet the directory that names it). Raises OSError."""
    _log.debug("write %s, %d bytes", path, len(content))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        for part in more:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Replace the content of a file; after any crash it has the old or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    # The content is durable before the rename: the other way round, a power failure could leave an empty
    # file.
    write_new(temporary, content)
    _log.debug("rename %s to %s", temporary, path)
    temporary.rename(path)
    sync_directory(path.parent)


def append(path: Path, end: int, content: bytes) -> None:
    """Cut a file to its first `end` bytes, which survive any crash, and append `content`.

    After a crash, part of the new content or anything else may follow it. A file with a second hard link is
    replaced instead: whoever made that link wants a copy that does not change. Without content, and if it
    is not replaced, this needs no room on a full disk. Raises OSError.
    """
    _log.debug("append to %s, %d bytes", path, len(content))
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        if os.fstat(descriptor).st_nlink == 1:
            _append(file, end, content)
            return
        kept = os.pread(descriptor, end, 0)
    replace(path, kept + content)


def publish(path: Path, content: bytes) -> None:
    """Create a file with this content: it is absent or complete. Raises FileExistsError, OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        write_new(temporary, content)
        place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def place(temporary: Path, target: Path) -> None:
    """Give a complete file its name, replacing nothing; not durable before the directory is synced.

    Raises FileExistsError, OSError.
    """
    _log.debug("link %s to %s", temporary, target)
    try:
        os.link(temporary, target)  # a rename would replace a file that another process has just created
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
    if number in (errno.EINVAL, errno.ENOSYS):  # not supported: check, then rename, is the best we can do
        number = errno.EEXIST if os.path.lexists(target) else 0
        if not number:
            source.rename(target)
    if number:
        raise OSError(number, os.strerror(number), str(target))


def rename(source: Path, target: Path) -> None:
    """Rename a directory or file within its parent, durably.

    If the parent cannot be synced, the rename is undone. Raises OSError.
    """
    _log.debug("rename %s to %s", source, target)
    source.rename(target)
    try:
        sync_directory(target.parent)
    except OSError:
        # The rename is the commit of a point. One that is not durable must not look committed: the VM's
        # bitmaps would be cleared for a point that a power failure takes away.
        target.rename(source)
        raise


def rename_new(source: Path, target: Path) -> None:
    """Rename as `rename` does, but replace nothing, not even an empty directory.

    Raises FileExistsError, OSError.
    """
    _log.debug("rename %s to %s", source, target)
    _rename_to_new(source, target)
    try:
        sync_directory(target.parent)
    except OSError:
        target.rename(source)
        raise


def remove(path: Path) -> None:
    """Remove a file, if it exists, durably. Raises OSError."""
    _log.debug("remove %s", path)
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def _append(file: FileIO, end: int, content: bytes) -> None:
    try:
        file.truncate(end)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(end)  # else the next call would append to a line that may not be on the disk
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
