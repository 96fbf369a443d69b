# SPDX-License-Identifier: GPL-2.0-or-later
"""Which files may be believed: those that nobody but root and we could have written, as for ssh and sudo.

A configuration says which monitor a root process speaks to and where it writes. So each directory and each
link on the way to it is checked by its descriptor, the file is opened in the last directory that was checked,
and what is read comes from the descriptor that was checked.
"""

import errno
import os
import shlex
import stat
from contextlib import closing
from pathlib import Path

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.system import path_walk


def read(path: Path, most_bytes: int) -> bytes:
    """Read a regular file that nobody else can change. Raises UsageError, OSError.

    The path may be relative: the directories above the current one count as well. One byte more than
    `most_bytes` is read of a file that is larger.
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
    with closing(path_walk.walk(path)) as steps:
        for step in steps:
            assert step.status is not None
            if step.is_link:
                _refuse_owner(step.path, step.status)
            elif step.last:
                return _open_file(step.path, step.name, step.directory, step.status)
            else:
                _refuse_directory(step.path, step.status)
    raise AssertionError("a walk ends with a last step")


def _open_file(shown: Path, name: str, directory: int, seen: os.stat_result) -> int:
    """Open the file itself; anything but a regular file is not even opened. Raises UsageError, OSError."""
    _refuse_file(shown, seen)
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
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
    _refuse_writable(shown, status)


def _refuse_directory(shown: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(shown))
    _refuse_owner(shown, status)
    _refuse_writable(shown, status)


def _refuse_owner(shown: Path, status: os.stat_result) -> None:
    us = os.geteuid()
    if status.st_uid not in (0, us):
        trusted = f"root or user {us}" if us else "root"
        raise UsageError(
            f"{shown} is not trusted: it belongs to user {status.st_uid}, not to {trusted}",
            state=UNTOUCHED,
            next_command=f"chown {us} {shlex.quote(str(shown))}",
        )


def _refuse_writable(shown: Path, status: os.stat_result) -> None:
    if path_walk.others_may_write(status):
        mode = stat.S_IMODE(status.st_mode)
        raise UsageError(
            f"{shown} is not trusted: it is writable by other users (mode {mode:04o})",
            state=UNTOUCHED,
            next_command=f"chmod go-w {shlex.quote(str(shown))}",
        )
