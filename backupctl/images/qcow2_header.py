# SPDX-License-Identifier: GPL-2.0-or-later
r"""The header of a qcow2 image, read without QEMU.

QEMU cannot be asked about a suspicious image: merely by opening one that keeps its data in another file it
would open that file, whatever its name. So the few fields that refer to other files are read here.

::

    0  magic "QFI\xfb"       8  offset of the backing name    32  kind of encryption
    4  version              16  length of the backing name    60  snapshots, and the offset of their table
    20 bits of a cluster    24  virtual size                  72  incompatible, compatible, autoclear features
    36 entries of L1        40  offset of L1                  48  offset and clusters of the reference counts'
    96 bits of a reference count                                  table
   104 compression, padding                                  100  length of the header; then extensions:
                                                                  type, length, data padded to 8 bytes
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import DamageFound
from backupctl.system import safe_open

_MAGIC = 0x514649FB
_FIXED = struct.Struct(">IIQIIQIIQQIIQQQQII")
_SIXTEEN_BITS = 4  # as a power of two
_FIXED_BYTES = 104
_HEADER_BYTES = (104, 112)  # before QEMU 5.1, and since
_BACKING_FORMAT = 0xE2792ACA
_READ_BYTES = 65536  # all of it lies in the first cluster
_NAME_BYTES = 1023


@dataclass(frozen=True)
class Header:
    """What the header of an image says.

    size: virtual, in bytes. file_bytes: the file's length. cluster: in bytes. backing, backing_format: ""
    for none. l1_offset, l1_entries: where the L1 table is said to be. refcount_offset, refcount_clusters: the
    same of the table of reference counts.
    """

    size: int
    file_bytes: int
    cluster: int
    backing: str
    backing_format: str
    l1_offset: int
    l1_entries: int
    refcount_offset: int
    refcount_clusters: int


def read(path: Path) -> Header:
    """Read an image's header. Raises DamageFound if backupctl would not write it, RepositoryUnreadable."""
    try:
        with safe_open.open_file(path) as file:
            return read_open(file.fileno(), path)
    except safe_open.NotThere as err:
        raise missing(path, err) from err


def missing(path: Path, err: safe_open.NotThere) -> DamageFound:
    """Return the error for an image that is missing."""
    return DamageFound(f"cannot open the image {path}: {err}")


def read_open(descriptor: int, path: Path) -> Header:
    """Read the header of an image that is open; `path` is for messages. Raises as `read`."""
    with safe_open.unreadable(path):
        content = os.pread(descriptor, _READ_BYTES, 0)
        file_bytes = os.fstat(descriptor).st_size
    try:
        return parse(content, file_bytes)
    except (ValueError, struct.error) as err:
        raise DamageFound(f"{path} is not a qcow2 image that backupctl made: {err}") from err


def parse(content: bytes, file_bytes: int) -> Header:
    """Read a header from an image's first cluster. Raises ValueError, struct.error."""
    magic, version, backing_at, backing_length, bits, size, encryption, *rest = _FIXED.unpack_from(content)
    entries, l1_offset, refcount_offset, refcount_clusters, *rest = rest
    *features, reference_bits, header_bytes = rest
    if (magic, version) != (_MAGIC, 3):
        raise ValueError("no magic number of qcow2 version 3")
    if encryption or any(features) or any(content[_FIXED_BYTES:header_bytes]):
        # Marked corrupt, not closed, data in another file, snapshots, …: none that we make, and some of them
        # would make QEMU open other files.
        raise ValueError(f"unsupported qcow2 features: {_features(encryption, features)}")
    if not 9 <= bits <= 21 or reference_bits != _SIXTEEN_BITS or header_bytes not in _HEADER_BYTES:
        raise ValueError("unexpected size of clusters, reference counts or header")
    if entries << (2 * bits - 3) < size:
        raise ValueError("the L1 table is too short for the virtual size")
    backing = ""
    if backing_at:
        if backing_length > _NAME_BYTES or backing_at + backing_length > len(content):
            raise ValueError("the backing file's name lies outside the first cluster")
        backing = content[backing_at : backing_at + backing_length].decode()
    return Header(
        size=size,
        file_bytes=file_bytes,
        cluster=1 << bits,
        backing=backing,
        backing_format=_extension(content, _BACKING_FORMAT),
        l1_offset=l1_offset,
        l1_entries=entries,
        refcount_offset=refcount_offset,
        refcount_clusters=refcount_clusters,
    )


def _features(encryption: int, features: Sequence[int]) -> str:
    snapshots, _, incompatible, compatible, autoclear = features
    return (
        f"encryption {encryption}, {snapshots} snapshots, incompatible 0x{incompatible:x}, "
        f"compatible 0x{compatible:x}, autoclear 0x{autoclear:x}"
    )


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
    raise ValueError("unterminated header extensions")
