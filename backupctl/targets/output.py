# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a restored image goes: a new file, absent or complete; or a block device, checked and fsynced."""

import errno
import fcntl
import os
import re
import secrets
import stat
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backupctl.errors import UNTOUCHED, Locked, TargetExists, UsageError, WriteFailed
from backupctl.events import Event
from backupctl.events.restore import AttributesNotKept
from backupctl.images import foreign_header
from backupctl.images.create import ImageFormat
from backupctl.images.foreign_header import ImageFeature
from backupctl.images.open_image import OpenImage
from backupctl.system import durable, locks, safe_directory
from backupctl.targets import ownership

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_TEMPORARY = ".backupctl-restore"
_NAME_BYTES = 200  # of the target's name, in the temporary file's name, which may have 255
_WRITING = 101  # the byte of an image that QEMU keeps locked for as long as it may write to it


def refuse_inside(repository: Path, target: Path) -> None:
    """Refuse a target within the repository. Raises UsageError."""
    if target.resolve().is_relative_to(repository.resolve()):
        raise UsageError(f"{target} is inside the repository", state=UNTOUCHED)


def refuse_in_use(target: Path) -> None:
    """Refuse to replace a file that QEMU writes to. Raises UsageError.

    Its VM would go on writing to a deleted file, and lose all of that when it stops.
    """
    with _looking_at(target) as found:
        if found is not None:
            _refuse_in_use(target, found)


def refuse_more_than_bytes(
    target: Path, image_format: ImageFormat, allowed: Collection[ImageFeature]
) -> None:
    """Refuse to replace an image with features by a plain one. Raises UsageError.

    A VM is configured for what its image is: with the key of an encrypted one, with a backing or data file.
    image_format: what the file is known to be; a raw file is not examined. allowed: the features that the
    user has allowed to be lost.
    """
    with _looking_at(target) as found:
        if found is None or image_format != "qcow2":
            return
        try:
            header = foreign_header.read(found)
        except ValueError:
            return  # QEMU would not open it, so no VM uses it
    for feature in sorted(header.features.difference(allowed)):
        raise UsageError(
            f"{target} {header.describe(feature)}. The restored image would be a plain one, which a "
            "VM that is configured for the present image could not use",
            state=UNTOUCHED,
            hint="restore to a new file; or allow the feature to be lost, and then reconfigure the VM",
            next_command=f"backupctl restore --allow-image-feature {feature}",
        )


def _refuse_in_use(target: Path, descriptor: int) -> None:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WRITING, 1, 0)
    try:
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
    except OSError:
        return  # a file system without locks: QEMU could not lock the file either
    if kind != fcntl.F_UNLCK:
        raise UsageError(f"{target} is in use, perhaps by a VM; it was not replaced")


@contextmanager
def _looking_at(target: Path) -> Iterator[int | None]:
    """Open a file that may be replaced, for reading; None if nothing is there.

    Raises TargetExists if it is not a regular file, UsageError if it cannot be opened: then nobody knows
    whether it is in use.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(target.resolve(), flags)
    except FileNotFoundError:
        yield None
        return
    except OSError as err:
        raise UsageError(
            f"cannot open {target} to see whether it is in use: {err.strerror}; it was not replaced",
            state=UNTOUCHED,
        ) from err
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise TargetExists(f"{target} is not a regular file; it was not replaced")
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def file(
    target: Path, *, force: bool, warn: Callable[[Event], None] = lambda _event: None
) -> Iterator[OpenImage]:
    """Yield an open, empty file to write to; when the block ends, it is `target`, durably.

    What is written to its descriptor goes into it, whatever happens to its name. A missing directory is made.
    Temporary files that killed restores to the same target left are removed. A file that is replaced passes
    on its owner, mode, ACL and labels; warn: called with those that could not be set.

    Raises TargetExists, Locked, WriteFailed, OSError; UsageError for a file in use, and, as root, for a
    directory that others may write to.
    """
    target = place_of(target)
    if not target.parent.is_dir():
        durable.make_directory(target.parent)
    descriptor, temporary = _claim(target)
    with OpenImage(temporary, descriptor) as image:
        try:
            yield image
            os.fsync(image.descriptor)
            _refuse_exchanged(image)
            _into_place(image.descriptor, temporary, target, force=force, warn=warn)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink()
            raise
        durable.sync_directory_if_it_can(target.parent)  # else a power failure costs the restore, no backup


def place_of(target: Path, option: str = "--to") -> Path:
    """Return where a target really is. As root, raises UsageError if others may write to its directory.

    option: the one that named the target, for the hint.
    """
    try:
        return safe_directory.resolve(target)
    except UsageError as err:
        raise err.add(
            state=UNTOUCHED,
            hint="use a directory that only root can write to, e.g. "
            f"{option} {safe_directory.SAFE}{target.name}",
        ) from err


def _refuse_exchanged(image: OpenImage) -> None:
    if not image.still_named():
        raise WriteFailed(f"another process replaced {image.path} while it was being written")


def _claim(target: Path) -> tuple[int, Path]:
    """Create a locked temporary file under a name that nobody can guess. Raises Locked, OSError."""
    prefix = f".{os.fsdecode(os.fsencode(target.name)[:_NAME_BYTES])}{_TEMPORARY}"
    _sweep(target, re.compile(rf"{re.escape(prefix)}(\.[0-9a-f]{{16}})?"))
    temporary = target.with_name(f"{prefix}.{secrets.token_hex(8)}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        _lock(descriptor, temporary)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, temporary


def _sweep(target: Path, ours: re.Pattern[str]) -> None:
    """Remove what killed restores to the same target left, and nothing that belongs to another user.

    It is never written to: it may be a hard link to the target itself. Raises Locked if another restore to
    the target is running.
    """
    owners = {os.geteuid()}
    with suppress(OSError):
        owners.add(target.stat().st_uid)  # a killed restore may have given the file to this user already
    with os.scandir(target.parent) as entries:
        found = [Path(entry.path) for entry in entries if ours.fullmatch(entry.name)]
    for path in found:
        with suppress(OSError):
            _clear(path, owners)


def _clear(leftover: Path, owners: set[int]) -> None:
    descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners:
            return
        try:
            _lock(descriptor, leftover)
        except Locked:
            # Others can lock a file that they can open, and keep it locked: then the lock says nothing.
            if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
                raise
            return
        leftover.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open file that still has its name. Raises Locked."""
    locked = Locked(f"another restore is writing {path}")
    try:
        taken = locks.acquire(descriptor, 0) and os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError as err:
        raise locked from err
    if not taken:
        raise locked


def _into_place(
    descriptor: int, temporary: Path, target: Path, *, force: bool, warn: Callable[[Event], None]
) -> None:
    if force:
        with _looking_at(target) as replaced:
            if replaced is not None:
                _refuse_in_use(target, replaced)
                _take_after(replaced, descriptor, target, warn)
        temporary.rename(target)
        return
    try:
        durable.place(temporary, target)
    except FileExistsError as err:
        raise TargetExists(f"{target} was created by another process") from err


def _take_after(replaced: int, descriptor: int, target: Path, warn: Callable[[Event], None]) -> None:
    lost = ownership.keep(replaced, descriptor)
    os.fsync(descriptor)
    if lost:
        warn(AttributesNotKept(target, tuple(lost)))


@contextmanager
def device(target: Path, size_bytes: int) -> Iterator[OpenImage]:
    """Yield an open block device to write to; when the block ends, it is fsynced.

    A device in use (mounted, part of a volume group) is never written. If the block raises, the device holds
    part of the image. Raises UsageError, OSError.
    """
    try:
        claim = os.open(place_of(target), os.O_RDWR | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise UsageError(f"{target} is in use (mounted, or part of a volume group)") from err
        raise
    try:
        if not stat.S_ISBLK(os.fstat(claim).st_mode):
            raise UsageError(f"{target} is not a block device any more")
        room = os.lseek(claim, 0, os.SEEK_END)
        if room < size_bytes:
            raise UsageError(f"{target} has {room} bytes; the disk needs {size_bytes}")
        yield OpenImage(target, claim)
        os.fsync(claim)
    finally:
        os.close(claim)
