# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a restored image lands: absent or complete, for a file; checked and fsynced, for a device."""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backupctl import trusted
from backupctl.errors import Locked, TargetExists, UsageError, WriteFailed
from backupctl.repository import durable
from backupctl.repository.open_image import OpenImage

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: kind, whence, start, length, process
_WRITING = 101  # the byte of an image that QEMU keeps locked for as long as it may write to it


def refuse_inside(repository: Path, target: Path) -> None:
    """Refuse a target within the repository. Raises UsageError."""
    if target.resolve().is_relative_to(repository.resolve()):
        raise UsageError(f"{target} is in the repository, which is only read", state="nothing was touched")


def refuse_in_use(target: Path) -> None:
    """Refuse to replace a file that QEMU writes to. Raises UsageError.

    Its VM would go on in a file that has no name any more, and all that it writes would be gone with its end.
    """
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WRITING, 1, 0)
    try:
        with target.open("rb") as found:
            kind, *_ = _FLOCK.unpack(fcntl.fcntl(found, fcntl.F_OFD_GETLK, asked))
    except OSError:
        return  # nothing is there, or nothing that tells
    if kind != fcntl.F_UNLCK:
        raise UsageError(f"{target} is in use, by a VM perhaps: it is not replaced")


@contextmanager
def file(target: Path, *, force: bool) -> Iterator[OpenImage]:
    """Give an empty file to write to, open; when the block ends well, it is on the disk as `target`.

    What is written to its descriptor goes into it, whatever has become of its name. A missing folder is made.
    What a dead restore to the same target left is taken over, so nothing piles up. Raises TargetExists,
    Locked, WriteFailed, OSError; UsageError for a folder that others could turn on root.
    """
    target = place_of(target)
    if not target.parent.is_dir():
        durable.make_folder(target.parent, mode=0o755)
    temporary = target.with_name(f".{target.name[:200]}.backupctl-restore")
    with OpenImage(temporary, _claim(temporary)) as image:
        try:
            yield image
            os.fsync(image.descriptor)
            _refuse_exchanged(image)
            _into_place(temporary, target, force=force)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink()
            raise
        durable.sync_folder_if_it_can(target.parent)  # the image is complete, and can be made again


def place_of(target: Path, option: str = "--to") -> Path:
    """Return where a target really is. Raises UsageError for one whose folder others could turn on root.

    option: the one that named it, for the advice.
    """
    try:
        return trusted.resolve(target)
    except UsageError as err:
        raise err.add(
            state="nothing was touched", next_command=f"the same with {option} {trusted.SAFE}{target.name}"
        ) from err


def _refuse_exchanged(image: OpenImage) -> None:
    if not image.still_named():
        raise WriteFailed(f"{image.path} was exchanged by another process while it was being written")


def _claim(temporary: Path) -> int:
    """Make the file that only we write. Raises Locked."""
    try:
        descriptor = _make(temporary)
    except FileExistsError:
        # A dead restore's. It is never written to: it may be the very file that stands as the target.
        leftover = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(leftover, temporary)
            temporary.unlink()
        finally:
            os.close(leftover)
        descriptor = _make(temporary)
    try:
        _lock(descriptor, temporary)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open file that still has its name. Raises Locked."""
    locked = Locked(f"another restore writes {path}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named = os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (BlockingIOError, FileNotFoundError) as err:
        raise locked from err
    if not named:
        raise locked


def _into_place(temporary: Path, target: Path, *, force: bool) -> None:
    if force:
        if target.exists() and not target.is_file():
            raise TargetExists(f"{target} is no plain file: it is not replaced")
        refuse_in_use(target)
        temporary.rename(target)
        return
    try:
        durable.place(temporary, target)
    except FileExistsError as err:
        raise TargetExists(f"{target} has come into being meanwhile") from err


@contextmanager
def device(target: Path, size_bytes: int) -> Iterator[OpenImage]:
    """Give a block device to write to; when the block ends well, it is fsynced.

    A device in use (mounted, part of a volume group) is never written. When the block raises, it holds
    part of the image. Raises UsageError, OSError.
    """
    try:
        claim = os.open(target, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise UsageError(f"{target} is in use (mounted, or part of something)") from err
        raise
    try:
        room = os.lseek(claim, 0, os.SEEK_END)
        if room < size_bytes:
            raise UsageError(f"{target} has {room} bytes; the disk needs {size_bytes}")
        yield OpenImage(target, claim)
        os.fsync(claim)
    finally:
        os.close(claim)
