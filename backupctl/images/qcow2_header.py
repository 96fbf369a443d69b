# SPDX-License-Identifier: GPL-2.0-or-later
r"""The header of a qcow2 image, read without QEMU.

QEMU can't be asked what a suspicious image says: already by opening one that keeps its data in another
file it opens that file, whatever its name. So the few fields that could lead elsewhere are read here.

::

    0  magic "QFI\xfb"       8  offset of the backing name    32  kind of encryption
    4  version              16  length of the backing name    60  snapshots, and the offset of their table
    20 bits of a cluster    24  virtual size                  72  incompatible, compatible, autoclear features
    36 entries of L1        96  bits of a reference count    100  length of the header; then extensions:
   104 compression, padding                                       type, length, data padded to 8 bytes
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import DamageFound
from backupctl.system import safe_open

_MAGIC = 0x514649FB
_FIXED = struct.Struct(">IIQIIQII20xIQQQQII")
_SIXTEEN_BITS = 4  # as a power of two
_FIXED_BYTES = 104
_HEADER_BYTES = (104, 112)  # before QEMU 5.1, and since
_BACKING_FORMAT = 0xE2792ACA
_READ_BYTES = 65536  # all of it lies in the first cluster
_NAME_BYTES = 1023


@dataclass(frozen=True)
class Header:
    """What an image says of itself.

    size: virtual, in bytes. file_bytes: the file's length. cluster: in bytes. backing, backing_format: ""
    for none.
    """

    size: int
    file_bytes: int
    cluster: int
    backing: str
    backing_format: str


def read(path: Path) -> Header:
    """Read an image's header. Raises DamageFound if it is none that we would write, RepositoryUnreadable."""
    try:
        with safe_open.open_file(path) as file:
            return read_open(file.fileno(), path)
    except safe_open.NotThere as err:
        raise missing(path, err) from err


def missing(path: Path, err: safe_open.NotThere) -> DamageFound:
    """Return the error for an image that is not there."""
    return DamageFound(f"the image {path} can't be read: {err}")


def read_open(descriptor: int, path: Path) -> Header:
    """Read the header of an image that is open; `path` is for messages. Raises as `read`."""
    with safe_open.unreadable(path):
        content = os.pread(descriptor, _READ_BYTES, 0)
        file_bytes = os.fstat(descriptor).st_size
    try:
        return parse(content, file_bytes)
    except (ValueError, struct.error) as err:
        raise DamageFound(f"{path} is no qcow2 image of ours: {err}") from err


def parse(content: bytes, file_bytes: int) -> Header:
    """Read a header from an image's first cluster. Raises ValueError, struct.error."""
    (magic, version, backing_at, backing_length, bits, size, encryption, entries, *rest) = _FIXED.unpack_from(
        content
    )
    *features, reference_bits, header_bytes = rest
    if (magic, version) != (_MAGIC, 3):
        raise ValueError("it does not begin as one of version 3 does")
    if encryption or any(features) or any(content[_FIXED_BYTES:header_bytes]):
        # Encrypted, marked corrupt, not closed, data in another file, snapshots, ...: none that we make.
        raise ValueError("it has features that none of ours has")
    if not 9 <= bits <= 21 or reference_bits != _SIXTEEN_BITS or header_bytes not in _HEADER_BYTES:
        raise ValueError("its clusters, reference counts or header have no size that we make")
    if entries << (2 * bits - 3) < size:
        raise ValueError("its first table is too short for its size")
    backing = ""
    if backing_at:
        if backing_length > _NAME_BYTES or backing_at + backing_length > len(content):
            raise ValueError("its backing name lies elsewhere")
        backing = content[backing_at : backing_at + backing_length].decode()
    return Header(size, file_bytes, 1 << bits, backing, _extension(content, _BACKING_FORMAT))


def _extension(content: bytes, wanted: int) -> str:
    """Return the text of a header extension, "" if there is none."""
    (at,) = struct.unpack_from(">I", content, 100)
    while at >= _FIXED_BYTES:
        kind, length = struct.unpack_from(">II", content, at)
        if kind == 0:
            return ""
        if at + 8 + length > len(content):
            break
        if kind == wanted:
            return content[at + 8 : at + 8 + length].decode()
        at += 8 + (length + 7) // 8 * 8
    raise ValueError("its header's extensions have no end")
