# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of the user's directory that disks are mounted over: each an empty file, `DISK.raw`.

A mount whose server was killed without a trace of its helper is stale: every access fails. It is found here,
and removed only if it is asked for.
"""

import errno
import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from backupctl.errors import UNTOUCHED, TargetExists, UsageError, WriteFailed
from backupctl.targets import output

_SUFFIX = ".raw"
_MOUNTS = Path("/proc/self/mounts")
_ESCAPED = re.compile(
    rb"\\([0-7]{3})"
)  # spaces, tabs, line ends and backslashes: proc_pid_mounts(5), fstab(5)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def made(directory: Path, disks: Sequence[str]) -> Iterator[tuple[Path, ...]]:
    """Make an empty file for each disk, and remove it when the block ends, if it is still that file.

    Empty files that a killed mount left are used. Raises UsageError if one is mounted already or the
    directory is not safe for root, TargetExists, WriteFailed.
    """
    place = output.place_of(directory, "DIR")
    _make_directory(place)
    paths = tuple(place / f"{disk}{_SUFFIX}" for disk in disks)
    for path in paths:
        _refuse(place, path)
    ours: list[tuple[Path, os.stat_result]] = []
    try:
        ours += ((path, _claim(path)) for path in paths)
        yield paths
    finally:
        for path, found in ours:
            with suppress(OSError):  # it is empty, and the next mount uses it
                if os.path.samestat(path.lstat(), found):
                    path.unlink()


def mounted(directory: Path) -> tuple[Path, ...]:
    """Return the files of a directory that something is mounted over, stale mounts too. Raises UsageError."""
    try:
        own = directory.stat().st_dev
        paths = sorted(path for path in directory.iterdir() if path.suffix == _SUFFIX)
    except OSError as err:
        raise UsageError(f"cannot read {directory}: {err.strerror}", state=UNTOUCHED) from err
    return tuple(path for path in paths if _is_mounted(own, path))


def is_listed(path: Path) -> bool:
    """Whether the kernel lists a mount over a file; its directory is an absolute path without links.

    Nothing of the mount is touched: whoever is about to remove it would find it in use.
    """
    places = (line.split(b" ")[1] for line in _MOUNTS.read_bytes().splitlines())
    return any(_ESCAPED.sub(_unescaped, place) == os.fsencode(path) for place in places)


def _unescaped(found: re.Match[bytes]) -> bytes:
    return bytes([int(found[1], 8)])


def _is_mounted(own_device: int, path: Path) -> bool:
    try:
        return path.lstat().st_dev != own_device
    except OSError as err:
        return err.errno == errno.ENOTCONN


def _make_directory(place: Path) -> None:
    try:
        place.mkdir(0o700, exist_ok=True)
    except OSError as err:
        raise UsageError(f"cannot use {place}: {err.strerror}", state=UNTOUCHED) from err


def _refuse(directory: Path, path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as err:
        if err.errno != errno.ENOTCONN:
            raise UsageError(f"cannot use {path}: {err.strerror}", state=UNTOUCHED) from err
        raise UsageError(
            f"{path} is a stale mount: its server was killed",
            state=UNTOUCHED,
            next_command=f"fusermount3 -u {shlex.quote(str(path))}",
        ) from err
    if _is_mounted(directory.stat().st_dev, path):
        raise UsageError(
            f"something is mounted over {path} already",
            state=UNTOUCHED,
            next_command=f"backupctl umount {shlex.quote(str(directory))}",
        )
    if not stat.S_ISREG(found.st_mode) or found.st_size or found.st_uid != os.geteuid():
        raise TargetExists(f"{path} already exists", state=UNTOUCHED, hint="use an empty directory")


def _claim(path: Path) -> os.stat_result:
    try:
        with suppress(FileExistsError):
            os.close(os.open(path, _NEW, 0o600))
        return path.lstat()
    except OSError as err:
        raise WriteFailed(f"cannot create {path}: {err.strerror}", state=UNTOUCHED) from err
