# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a restored image lands: absent or complete, for a file; checked and fsynced, for a device."""

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
from backupctl.system import durable, locks, safe_folder
from backupctl.targets import ownership

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: kind, whence, start, length, process
_TEMPORARY = ".backupctl-restore"
_NAME_BYTES = 200  # of the target's name in that of the temporary file, which may have 255
_WRITING = 101  # the byte of an image that QEMU keeps locked for as long as it may write to it


def refuse_inside(repository: Path, target: Path) -> None:
    """Refuse a target within the repository. Raises UsageError."""
    if target.resolve().is_relative_to(repository.resolve()):
        raise UsageError(f"{target} is in the repository, which is only read", state=UNTOUCHED)


def refuse_in_use(target: Path) -> None:
    """Refuse to replace a file that QEMU writes to. Raises UsageError.

    Its VM would go on in a file that has no name any more, and all that it writes would be gone with its end.
    """
    with _looking_at(target) as found:
        if found is not None:
            _refuse_in_use(target, found)


def refuse_more_than_bytes(
    target: Path, image_format: ImageFormat, allowed: Collection[ImageFeature]
) -> None:
    """Refuse to put a plain image in the place of one that is more than that. Raises UsageError.

    A VM is configured for what its image is: with the key of an encrypted one, with the backing or data file
    beside it. image_format: what the file is known to be; in a raw one nothing is looked for. allowed: what
    the user knows of.
    """
    with _looking_at(target) as found:
        if found is None or image_format != "qcow2":
            return
        try:
            header = foreign_header.read(found)
        except ValueError:
            return  # no image that QEMU would open
    for feature in sorted(header.features.difference(allowed)):
        raise UsageError(
            f"{target} {header.describe(feature)}. The restored image would be plain, and a VM that is "
            "configured for the present one could not use it",
            state=UNTOUCHED,
            hint="restore to a new file; or replace it all the same, and then adapt the VM's configuration",
            next_command=f"backupctl restore --allow-image-feature {feature}",
        )


def _refuse_in_use(target: Path, descriptor: int) -> None:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WRITING, 1, 0)
    try:
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
    except OSError:
        return  # a file system without locks: QEMU has none either
    if kind != fcntl.F_UNLCK:
        raise UsageError(f"{target} is in use, by a VM perhaps: it is not replaced")


@contextmanager
def _looking_at(target: Path) -> Iterator[int | None]:
    """Open a file that may be replaced, for reading; None if nothing is there.

    Raises TargetExists if it is no plain file, UsageError if it can't be opened: what can't be looked at is
    not known to be unused.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(target.resolve(), flags)
    except FileNotFoundError:
        yield None
        return
    except OSError as err:
        raise UsageError(
            f"{target} is not replaced: it can't be opened to see whether it is in use: {err.strerror}",
            state=UNTOUCHED,
        ) from err
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise TargetExists(f"{target} is no plain file: it is not replaced")
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def file(
    target: Path, *, force: bool, warn: Callable[[Event], None] = lambda _event: None
) -> Iterator[OpenImage]:
    """Give an empty file to write to, open; when the block ends well, it is on the disk as `target`.

    What is written to its descriptor goes into it, whatever has become of its name. A missing folder is made.
    What dead restores to the same target left is cleared, so nothing piles up. A file that is replaced hands
    on its owner, mode, ACL and labels; warn: told what it could not.

    Raises TargetExists, Locked, WriteFailed, OSError; UsageError for one in use, and for a folder that others
    could turn on root.
    """
    target = place_of(target)
    if not target.parent.is_dir():
        durable.make_folder(target.parent)
    descriptor, temporary = _claim(target)
    with OpenImage(temporary, descriptor) as image:
        try:
            yield image
            os.fsync(image.descriptor)
            _refuse_exchanged(image)
            _into_place(image.descriptor, temporary, target, force=force, warn=warn)
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
        return safe_folder.resolve(target)
    except UsageError as err:
        raise err.add(
            state=UNTOUCHED,
            hint=f"use a folder that is root's own, such as {option} {safe_folder.SAFE}{target.name}",
        ) from err


def _refuse_exchanged(image: OpenImage) -> None:
    if not image.still_named():
        raise WriteFailed(f"{image.path} was exchanged by another process while it was being written")


def _claim(target: Path) -> tuple[int, Path]:
    """Make a file that only we write, under a name that nobody can take first. Raises Locked, OSError."""
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
    """Clear what dead restores to the same target left, and nothing of anybody else's.

    It is never written to: it may be the very file that stands as the target. Raises Locked if another
    restore of ours is at work.
    """
    owners = {os.geteuid()}
    with suppress(OSError):
        owners.add(target.stat().st_uid)  # to whom a restore gives the file before it dies
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
            # A file that others may open, they may lock as well, and for ever: that tells nothing.
            if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
                raise
            return
        leftover.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open file that still has its name. Raises Locked."""
    locked = Locked(f"another restore writes {path}")
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
        raise TargetExists(f"{target} has come into being meanwhile") from err


def _take_after(replaced: int, descriptor: int, target: Path, warn: Callable[[Event], None]) -> None:
    lost = ownership.keep(replaced, descriptor)
    os.fsync(descriptor)
    if lost:
        warn(AttributesNotKept(target, tuple(lost)))


@contextmanager
def device(target: Path, size_bytes: int) -> Iterator[OpenImage]:
    """Give a block device to write to; when the block ends well, it is fsynced.

    A device in use (mounted, part of a volume group) is never written. When the block raises, it holds
    part of the image. Raises UsageError, OSError.
    """
    try:
        claim = os.open(place_of(target), os.O_RDWR | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise UsageError(f"{target} is in use (mounted, or part of something)") from err
        raise
    try:
        if not stat.S_ISBLK(os.fstat(claim).st_mode):
            raise UsageError(f"{target} is no block device any more")
        room = os.lseek(claim, 0, os.SEEK_END)
        if room < size_bytes:
            raise UsageError(f"{target} has {room} bytes; the disk needs {size_bytes}")
        yield OpenImage(target, claim)
        os.fsync(claim)
    finally:
        os.close(claim)
