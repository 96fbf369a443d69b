# SPDX-License-Identifier: GPL-2.0-or-later
"""On the remote host: the lock by which one program of ours works on a VM at a time, its guard included.

A run that is killed has lost its lock on the machine that it ran on, while its guard may still be at work
there. The next run waits for this one.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backupctl.errors import Refused

_LOOK_SECONDS = 0.05
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


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
        deadline = time.monotonic() + seconds
        while True:
            with suppress(FileNotFoundError), _directory() as (path, directory):
                descriptor = os.open(name, _FLAGS, 0o600, dir_fd=directory)
                if _locked(descriptor, deadline):
                    # Only the file that has the name now counts: who ends removes it.
                    with suppress(OSError):
                        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        if os.path.samestat(found, os.fstat(descriptor)):
                            return cls(monitor, descriptor, path / name)
                os.close(descriptor)
            if time.monotonic() > deadline:
                raise Refused(
                    "another run, or the guard of one that was cut off, still works on this VM",
                    hint="a run works on one VM at a time; wait until it has ended",
                )

    def remove(self) -> None:
        """Remove the file of a lock that nobody else holds any more, and the last one's directory.

        Never raises.
        """
        with suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()


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


@contextmanager
def _directory() -> Iterator[tuple[Path, int]]:
    """Open a directory for locks that nobody else can write to, root's or this user's.

    The runtime directory of a user (``/run/user``) would not do: it is removed with the user's last session,
    which the guard outlives. Raises Refused, FileNotFoundError if another program that ends removes it.
    """
    user = os.geteuid()
    path = Path(tempfile.gettempdir()) / f"backupctl-{user}" if user else Path("/run/backupctl")
    try:
        with suppress(FileExistsError):
            path.mkdir(0o700)
    except OSError as err:
        raise Refused(f"cannot make the directory {path}: {err.strerror}") from err
    # By its descriptor from now on: where it was removed, another user may make one of that name.
    descriptor = _opened(path)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != user or found.st_mode & 0o022:
            raise Refused(
                f"{path} is not a directory of this user alone (its owner: user {found.st_uid})",
                hint=f"backupctl makes its own there; root may run: rm -r {path}",
            )
        yield path, descriptor
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as err:  # another user's, or not a directory at all
        raise Refused(f"{path} is not a directory of this user alone: {err.strerror}") from err
