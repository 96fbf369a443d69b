# SPDX-License-Identifier: GPL-2.0-or-later
"""The file `summary` of a VM: what is in it, how it is read, written and sealed.

::

    the checksum of the second line
    the content, as JSON
    the seal, if it has one (seal.py), with a checksum of its own over both

The first two lines are written as one file, and replaced as one. The seal is written into that file: another
name in the VM's directory would break it.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from backupctl.errors import RepositoryUnreadable
from backupctl.names import DiskName, PointId
from backupctl.repository.manifest import Consistency, PointKind
from backupctl.repository.seal import Stamp
from backupctl.repository.strict_json import Size
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import durable, safe_open

FILE_NAME = "summary"
FORMAT: Literal[2] = 2
MAX_BYTES = 1 << 27
_MOST_TIME = 253402300799  # the end of the year 9999
_CHECKSUM_BYTES = 32
_SEAL_BYTES = 95
_NUMBER = 20  # digits of the largest number of 64 bits

Time = Annotated[int, Meta(ge=0, le=_MOST_TIME)]


class DiskSummary(Struct, array_like=True, frozen=True, gc=False):
    """One disk of a point; sizes in bytes. See `DiskEntry`."""

    name: DiskName
    kind: PointKind
    parent: PointId | None
    size: Size
    copied_bytes: Size
    stored_bytes: Size
    file_bytes: Size


Identity = tuple[int, int, int, int, int]
"""What shows that a point is as it was: inode and time of change of its directory, the same of its manifest,
and the length of that. Times are in nanoseconds; no program can set them. Every file that is created, removed
or replaced in a directory, a marker too, sets that of the directory."""


class PointSummary(Struct, array_like=True, frozen=True, gc=False):
    """One point. started, ended: of its run, in seconds since 1970. frozen_ms: None if it was not frozen."""

    id: PointId
    identity: Identity
    retired: bool
    protected: bool
    kind: PointKind
    parent: PointId | None
    consistency: Consistency
    started: Time
    ended: Time
    frozen_ms: Size | None
    disks: tuple[DiskSummary, ...]

    @property
    def stored_bytes(self) -> int:
        """What its images take."""
        return sum(disk.stored_bytes for disk in self.disks)

    def disk(self, name: DiskName) -> DiskSummary | None:
        """Return one of its disks; None if it does not hold it."""
        for one in self.disks:
            if one.name == name:
                return one
        return None


class Content(Struct, frozen=True, forbid_unknown_fields=True):
    """What the file says. points: oldest first.

    history: the identity of the history with which these points were compared; None if anything was wrong, or
    could not be told: then manifests, history and layers are read each time.
    """

    format: Literal[2]
    vm: str
    repository: str
    history: tuple[int, int, int] | None
    points: list[PointSummary]


_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(Content)


@dataclass(frozen=True)
class Stored:
    """A summary that was read. stamp: how the VM's directory was sealed with it; None if it was not.

    checksum: of its content. end: where that ends in the file, in bytes from its beginning.
    """

    content: Content
    stamp: Stamp | None
    checksum: bytes
    end: int


def read(directory: VmDirectory) -> Stored | None:
    """Read the summary of a VM; None if there is nothing that can be used. Raises nothing."""
    try:
        return _parsed(safe_open.read(directory.path / FILE_NAME, MAX_BYTES), directory)
    except (safe_open.NotThere, RepositoryUnreadable):
        return None


def write(directory: VmDirectory, points: list[PointSummary], history: tuple[int, int, int] | None) -> None:
    """Replace the summary of a VM by one without a seal. Raises OSError."""
    content = Content(FORMAT, directory.name, directory.repository, history, points)
    durable.replace(directory.path / FILE_NAME, document(_ENCODER.encode(content)))


def write_seal(directory: VmDirectory, of: Stored, stamp: Stamp) -> None:
    """Add a seal to a summary that was read. Raises OSError, NotThere, RepositoryUnreadable."""
    descriptor = safe_open.open_descriptor(directory.path / FILE_NAME, os.O_RDWR)
    try:
        head = os.pread(descriptor, _CHECKSUM_BYTES, 0)
        # A second link is a copy that somebody made of the repository, which must not change.
        if head == of.checksum and os.fstat(descriptor).st_nlink == 1:
            # Not fsynced: what a crash makes of this line does not match its checksum, which costs time only.
            os.pwrite(descriptor, seal_line(of.checksum, stamp), of.end)
    finally:
        os.close(descriptor)


def document(content: bytes, seal: bytes = b"") -> bytes:
    """Return the file that has this content."""
    return checksum_of(content) + b"\n" + content + b"\n" + seal


def checksum_of(content: bytes | memoryview) -> bytes:
    """BLAKE3, 16 bytes, in hexadecimal digits."""
    return blake3(content).hexdigest(16).encode()


def seal_line(checksum: bytes, stamp: Stamp) -> bytes:
    """Return the third line. It has always the same length, so that a new one covers the old one."""
    numbers = b" ".join(f"{one:0{_NUMBER}}".encode() for one in stamp)
    return numbers + b" " + checksum_of(checksum + numbers)


def _parsed(file: bytes, directory: VmDirectory) -> Stored | None:
    end = file.find(b"\n", _CHECKSUM_BYTES + 1) + 1
    if not end or file[_CHECKSUM_BYTES : _CHECKSUM_BYTES + 1] != b"\n":
        return None
    checksum, content = file[:_CHECKSUM_BYTES], memoryview(file)[_CHECKSUM_BYTES + 1 : end - 1]
    if checksum != checksum_of(content):
        return None
    try:
        found = _DECODER.decode(content)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if (found.vm, found.repository) != (directory.name, directory.repository):
        return None
    return Stored(found, _stamp(checksum, file[end : end + _SEAL_BYTES]), checksum, end)


def _stamp(checksum: bytes, line: bytes) -> Stamp | None:
    numbers = line.split(b" ")[:-1]
    if len(numbers) != len(Stamp._fields) or not all(one.isdigit() for one in numbers):
        return None
    stamp = Stamp(*map(int, numbers))
    return stamp if seal_line(checksum, stamp) == line else None
