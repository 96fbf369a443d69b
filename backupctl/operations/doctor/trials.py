# SPDX-License-Identifier: GPL-2.0-or-later
"""Trying what a run will do in its directories, before it does it: some file systems can't do all of it.

::

    repository   write, fsync of file and directory, rename, a name that replaces nothing, flock, mmap
    scratch      a file without a name (O_TMPFILE, or one that is removed at once), room set aside (fallocate)
    temporary    a socket at the length of path that a run has, flock, some room

Everything is done in a directory of its own that is removed again; its name begins as those of a repository
in the making, so nobody takes it for anything else.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import BackupctlError, Failed
from backupctl.finding import Finding, Verdict
from backupctl.repository import repository
from backupctl.system import durable, locks, private_dir

SUBJECT = "directories"
_CONTENT = b"backupctl doctor was here\n" * 100
_ROOM_BYTES = 1 << 20
_KEEP_SIZE = 1  # fallocate's FALLOC_FL_KEEP_SIZE
_LOCAL = "use a local file system (ext4, xfs, btrfs), or an NFS mount"


@dataclass(frozen=True)
class _Trial:
    """One thing to try in an empty directory. means: what it is for the user when it raises an OSError."""

    what: str
    do: Callable[[Path], None]
    verdict: Verdict
    means: str
    advice: str = _LOCAL


def of_repository(path: Path) -> Iterator[Finding]:
    """Try the directory of a repository, or the one that it would be made in; none is made where neither is.

    A directory that is somebody else's, or not to be written to, is left alone: `doctor` tells of that.
    """
    directory = next((one for one in (path, path.absolute().parent) if one.is_dir()), None)
    if directory is not None and os.access(directory, os.W_OK | os.X_OK):
        yield from _tried("repository", directory, _REPOSITORY)


def of_scratch(directory: Path) -> Iterator[Finding]:
    """Try the directory for scratch files."""
    if directory.is_dir() and os.access(directory, os.W_OK | os.X_OK):
        yield from _tried("scratch", directory, _SCRATCH)


def of_temporary() -> Iterator[Finding]:
    """Try the temporary directory: the sockets of QEMU's tools are made in it."""
    try:
        directory = Path(tempfile.gettempdir())
    except OSError as err:
        yield Finding(SUBJECT, "bad", f"there is no temporary directory: {err.strerror}", "set TMPDIR")
        return
    yield from _tried("temporary", directory, _TEMPORARY)


def _tried(name: str, directory: Path, trials: tuple[_Trial, ...]) -> Iterator[Finding]:
    """Tell of each trial that fails, or that all went well."""
    if (unnamed := repository.path_error(directory)) and name != "scratch":
        yield Finding(SUBJECT, "bad", unnamed, "rename it")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=repository.IN_THE_MAKING, dir=directory) as made:
            found = [failed for trial in trials if (failed := _failure(directory, Path(made), trial))]
    except OSError as err:
        found = [Finding(SUBJECT, "bad", f"{directory}: no directory can be made or removed: {err.strerror}")]
    yield from found
    if not found:
        yield Finding(SUBJECT, "ok", f"{name} directory {directory} supports all that a run does there")


def _failure(directory: Path, made: Path, trial: _Trial) -> Finding | None:
    try:
        trial.do(made)
    except OSError as err:
        said = f"{directory}: {trial.what}: {err.strerror or err}; {trial.means}"
        return Finding(SUBJECT, trial.verdict, said, trial.advice)
    except BackupctlError as err:
        return Finding(SUBJECT, trial.verdict, f"{directory}: {err.message}; {trial.means}", trial.advice)
    return None


def _write(directory: Path) -> None:
    durable.write_new(directory / "written", _CONTENT)
    if (directory / "written").read_bytes() != _CONTENT:
        raise OSError(errno.EIO, "what was written is not what is read")


def _rename(directory: Path) -> None:
    durable.make_directory(directory / "old")
    durable.rename(directory / "old", directory / "new")
    durable.write_new(directory / "one", b"1")
    durable.replace(directory / "one", b"2")


def _place(directory: Path) -> None:
    durable.write_new(directory / "nameless", b"")
    durable.place(directory / "nameless", directory / "placed")


def _lock_file(directory: Path) -> None:
    _lock(directory / "lock", os.O_RDWR | os.O_CREAT)


def _lock_directory(directory: Path) -> None:
    _lock(directory, os.O_RDONLY | os.O_DIRECTORY)


def _lock(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        locks.take(descriptor, 0)
    finally:
        os.close(descriptor)


def _map(directory: Path) -> None:
    """Map a file, as digest maps are: shared, or else privately."""
    with (directory / "written").open("rb") as file:
        with suppress(OSError), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            return
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY).close()


def _nameless(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(_CONTENT)
        file.flush()


def _reserve(directory: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    with tempfile.TemporaryFile(dir=directory) as file:
        if library.fallocate(file.fileno(), _KEEP_SIZE, 0, _ROOM_BYTES):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _socket(_directory: Path) -> None:
    """Make a socket as a run does, in the first temporary directory that its path fits into."""
    try:
        private_dir.check()
    except Failed as err:
        raise OSError(errno.EINVAL, err.message) from err


def _lock_temporary(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _room(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(_ROOM_BYTES))
        file.flush()


_NO_POINT = "no recovery point can be made there"
_REPOSITORY = (
    _Trial("writing and fsync of a file", _write, "bad", _NO_POINT),
    _Trial("fsync of a directory", durable.sync_directory, "bad", _NO_POINT),
    _Trial("renaming", _rename, "bad", _NO_POINT),
    _Trial("giving a name that replaces nothing", _place, "bad", "no repository can be made there"),
    _Trial(
        "locking a file (flock)",
        _lock_file,
        "bad",
        "two runs at once could not be kept apart, so none starts",
    ),
    _Trial("locking a directory (flock)", _lock_directory, "warning", "prune does not work there"),
    _Trial(
        "mapping a file (mmap)",
        _map,
        "warning",
        "digest maps are held in memory instead: 384 MiB for each TiB that is stored",
        "provide that much memory, or use another file system",
    ),
)
_TEMP = "set TMPDIR to another directory"
_SCRATCH = (
    _Trial("a file without a name", _nameless, "bad", "no scratch file can be made", "scratch, --scratch"),
    _Trial(
        "setting room aside (fallocate)",
        _reserve,
        "warning",
        "the space is not guaranteed: a run stops when little is left",
        "another directory: scratch, --scratch",
    ),
)
_TEMPORARY = (
    _Trial(
        "a socket",
        _socket,
        "bad",
        "QEMU's tools cannot be reached",
        "set TMPDIR to a directory with a short path",
    ),
    _Trial("locking a directory (flock)", _lock_temporary, "bad", "no socket is made there", _TEMP),
    _Trial("a file of 1 MiB", _room, "bad", "errors of QEMU's tools would be lost", _TEMP),
)
