# SPDX-License-Identifier: GPL-2.0-or-later
"""Directories for sockets, which no other user may enter; those of killed processes are removed later."""

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from backupctl.errors import Failed
from backupctl.system import locks

_PREFIX = "bctl-"  # short: the path of a unix socket has at most 107 bytes
_SOCKET_BYTES = 107
_LONGEST = f"/{_PREFIX}xxxxxxxx/public/nbd.sock"
_ELSEWHERE = ("/tmp", "/var/tmp")  # noqa: S108 - a directory of our own is made in it
_NEW_SECONDS = 60.0  # one that is being made is not locked yet


@contextmanager
def directory() -> Iterator[Path]:
    """Create a directory for a socket, locked until the block ends; remove those of killed processes.

    It is in the user's temporary directory, or in the system's if that path is too long for a socket or not
    UTF-8. Raises Failed.
    """
    with ExitStack() as made:
        try:
            base = _base()
            _sweep(base)
            name = made.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base))
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            made.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as err:
            raise Failed(f"cannot use a temporary directory: {err.strerror or err}") from err
        yield Path(name)


@contextmanager
def named(path: Path) -> Iterator[Path]:
    """Create the directory of this name, which must not exist, as `directory` does; remove it at the end.

    For a process that is told where its sockets must be. Raises Failed.
    """
    try:
        _sweep(path.parent)
        path.mkdir(0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        raise Failed(f"cannot make the directory {path}: {err.strerror or err}") from err
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)


def new_name() -> Path:
    """Return a name for `named` on any machine; chance sees to it that nothing has it yet."""
    return Path(_ELSEWHERE[0]) / f"{_PREFIX}{os.urandom(8).hex()}"


def is_in_one(path: Path) -> bool:
    """Whether a file is in a directory of any run of ours, by its name."""
    return path.parent.name.startswith(_PREFIX)


def check() -> None:
    """Check that `directory` works, by making a socket in one. Raises Failed, naming the directory."""
    with directory() as made, socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.bind(str(made / "trial"))
        except OSError as err:
            why = err.strerror or str(err)
            raise Failed(f"cannot make a socket in the temporary directory {made.parent}: {why}") from err


def _base() -> Path:
    """Return the first directory whose path is valid for QEMU and for a socket. Raises Failed."""
    wanted = tempfile.gettempdir()
    for each in (wanted, *_ELSEWHERE):
        if _fits(each) and os.access(each, os.W_OK | os.X_OK):
            return Path(each)
    raise Failed(
        f"cannot use the temporary directory {wanted} for a socket: its path must be UTF-8 and have "
        f"{_SOCKET_BYTES - len(_LONGEST)} bytes at most; set TMPDIR to another directory"
    )


def _fits(path: str) -> bool:
    try:
        return len(path.encode()) + len(_LONGEST) <= _SOCKET_BYTES
    except UnicodeEncodeError:
        return False


def _sweep(temporary: Path) -> None:
    """Remove the directories of killed processes: those that nobody keeps locked."""
    for path in temporary.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < _NEW_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if locks.acquire(descriptor, 0):
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)
