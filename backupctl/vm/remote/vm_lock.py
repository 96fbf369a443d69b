# SPDX-License-Identifier: GPL-2.0-or-later
"""On the remote host: the lock by which one program of ours works on a VM at a time, its guard included.

A run that is killed has lost its lock on the machine that it ran on, while its guard may still be at work
there. The next run waits for this one.
"""

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from backupctl.errors import Refused

_LOOK_SECONDS = 0.05


class VmLock:
    """The lock of the VM with this monitor, held from `acquire` to the end of all processes that have it."""

    def __init__(self, monitor: str, descriptor: int, path: Path) -> None:
        self.monitor = monitor
        self.descriptor = descriptor
        self._path = path

    @classmethod
    def acquire(cls, monitor: str, seconds: float) -> "VmLock":
        """Take the lock; wait for so long while another has it. Raises Refused."""
        name = hashlib.sha256(os.path.realpath(monitor).encode()).hexdigest()[:32]
        path = _directory() / name
        deadline = time.monotonic() + seconds
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if _locked(descriptor, deadline):
                # Only the file that has the name now counts: who ends removes it.
                with suppress(OSError):
                    if os.path.samestat(path.lstat(), os.fstat(descriptor)):
                        return cls(monitor, descriptor, path)
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise Refused("another run, or the guard of one that was cut off, still works on this VM")

    def remove(self) -> None:
        """Remove the file of a lock that nobody else holds any more. Never raises."""
        with suppress(OSError):
            self._path.unlink()


def _locked(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        else:
            return True


def _directory() -> Path:
    """Return a directory for locks that nobody else can write to, root's or this user's. Raises Refused."""
    user = os.geteuid()
    path = Path(tempfile.gettempdir()) / f"backupctl-{user}" if user else Path("/run/backupctl")
    try:
        with suppress(FileExistsError):
            path.mkdir(0o700)
        found = path.lstat()
    except OSError as err:
        raise Refused(f"cannot make the directory {path}: {err.strerror}") from err
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise Refused(f"{path} is not a directory of this user alone")
    return path
