# SPDX-License-Identifier: GPL-2.0-or-later
"""What may be believed: a file that nobody but root and we could have written, as ssh and sudo want it.

A configuration says which monitor a root process speaks to and where it writes. So each folder and each link
on the way to it is looked at by its descriptor, the file is opened below the last of them, and what is read
comes from the descriptor that was looked at.
"""

import errno
import os
import shlex
import stat
from pathlib import Path

from backupctl.errors import UNTOUCHED, UsageError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  # as many as the kernel follows


def read(path: Path, most_bytes: int) -> bytes:
    """Read a plain file, of which nobody else may have any part. Raises UsageError, OSError.

    The path may be relative: the folders above the current one count as well. One byte more than `most_bytes`
    is read of a file that is larger.
    """
    descriptor = _open(path)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most_bytes + 1)


def objection(path: Path) -> UsageError | None:
    """Return why a file should not be believed, or run; None if it may be. Raises OSError."""
    try:
        os.close(_open(path))
    except UsageError as err:
        return err
    return None


def _open(path: Path) -> int:
    """Walk to a file from the root and open it. Raises UsageError, OSError."""
    rest = list(reversed(path.absolute().parts[1:]))
    shown, folder, links = Path("/"), os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), 0
    try:
        _refuse_folder(shown, os.fstat(folder))
        while rest:
            part = rest.pop()
            found = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                status = os.fstat(found)
                if stat.S_ISLNK(status.st_mode):
                    _refuse_owner(shown / part, status)
                    links += 1
                    target = Path(_target(found, links, path))
                    rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
                    if target.is_absolute():
                        os.close(folder)
                        shown, folder = Path("/"), os.open("/", os.O_PATH | os.O_CLOEXEC)
                    continue
                shown /= part
                if not rest:
                    return _open_file(shown, part, folder, status)
                _refuse_folder(shown, status)
                folder, found = found, folder
            finally:
                os.close(found)
    finally:
        os.close(folder)
    raise UsageError(f"{path} is not used: it is not a regular file", state=UNTOUCHED)


def _target(link: int, links: int, path: Path) -> str:
    if links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.readlink("", dir_fd=link)


def _open_file(shown: Path, name: str, folder: int, seen: os.stat_result) -> int:
    """Open the file itself; what is no plain file is not even opened. Raises UsageError, OSError."""
    _refuse_file(shown, seen)
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        _refuse_file(shown, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_file(shown: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{shown} is not used: it is not a regular file", state=UNTOUCHED)
    _refuse_owner(shown, status)
    if status.st_mode & _OTHERS_WRITE:
        raise _writable(shown, status)


def _refuse_folder(shown: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(shown))
    _refuse_owner(shown, status)
    # In a sticky folder (/tmp) nobody can rename or remove what is ours.
    if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
        raise _writable(shown, status)


def _refuse_owner(shown: Path, status: os.stat_result) -> None:
    us = os.geteuid()
    if status.st_uid not in (0, us):
        trusted = f"root or user {us}" if us else "root"
        raise UsageError(
            f"{shown} is not trusted: it belongs to user {status.st_uid}, not to {trusted}",
            state=UNTOUCHED,
            next_command=f"chown {us} {shlex.quote(str(shown))}",
        )


def _writable(shown: Path, status: os.stat_result) -> UsageError:
    return UsageError(
        f"{shown} is not trusted: it is writable by other users (mode {stat.S_IMODE(status.st_mode):04o})",
        state=UNTOUCHED,
        next_command=f"chmod go-w {shlex.quote(str(shown))}",
    )
