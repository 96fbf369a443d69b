# SPDX-License-Identifier: GPL-2.0-or-later
"""The digest map: what a layer stores, cluster by cluster, as it was when it was read from the VM.

``POINT/<disk>.digests``, little endian::

     0   8  magic "bkdigest"
     8   4  version, 1
    12   4  bytes in a cluster, 65536
    16   8  virtual size of the disk in bytes
    24   8  count of records
    32  16  BLAKE3 truncated to 16 bytes, of bytes 0 to 31 and all the records
    48  16  zero
    64      records, 24 bytes each: cluster (8), digest (16), ascending by cluster

A cluster's digest is BLAKE3 truncated to 16 bytes, of its 65536 bytes; a short last cluster is padded with
zeroes. 16 zero bytes stand for a cluster that is stored as zeroes.

First the header must match the disk in the manifest, and the file's length the header: so a file that is
longer than the disk allows is refused before it is read. Then all of it is read once, in pieces, and checked;
only then is it mapped, unless it is small. Where mmap fails (FUSE without shared mappings, no memory to
commit) it is read into memory.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from blake3 import blake3

from backupctl.digests.clusters import CLUSTER_BYTES, RECORD, Records, count
from backupctl.errors import DamageFound, WriteFailed
from backupctl.system import durable, safe_open

SUFFIX = ".digests"
"""In place of the suffix of the image."""
MAGIC = b"bkdigest"
VERSION = 1
_HEAD = struct.Struct("<8sIIQQ")
_HEADER_BYTES = 64
_CHECKSUM = slice(32, 48)
_CHECKSUM_BYTES = 16
_PIECE_RECORDS = 1 << 16
_FEW_RECORDS = 256  # 6 KiB, which a run keeps in memory: the maps of a long chain would be as many open files


class Named(NamedTuple):
    """What a manifest says of a digest map: the disk's virtual size, and the map's checksum in hex."""

    size_bytes: int
    checksum: str


def path_of(image: Path) -> Path:
    """Return where the digest map of a layer lies: beside its image."""
    return image.with_suffix(SUFFIX)


def merged_path_of(image: Path) -> Path:
    """Return where the map of a merged layer waits until its image is in place."""
    return image.with_suffix(".digests.merged")


@dataclass(frozen=True)
class DigestMap:
    """A layer's digest map.

    records: read-only. checksum: 32 hex digits. mapped: whether the records are the file itself, which stays
    open then.
    """

    size_bytes: int
    records: Records
    checksum: str
    mapped: bool = False

    @classmethod
    def open(cls, path: Path, named: Named | None = None, check: Callable[[], None] = lambda: None) -> Self:
        """Open a map, after every byte of it was checked.

        named: what it must be. check: called between pieces, may raise to cancel. Raises DamageFound,
        RepositoryUnreadable.
        """
        try:
            with safe_open.open_file(path) as file:
                header = _header(path, file, named)
                last = _check_records(path, file, header, check)
                if header.records <= _FEW_RECORDS:
                    return cls(header.size_bytes, last, header.checksum.hex())
                records = _records(file, header.records)
        except safe_open.NotThere as err:
            raise DamageFound(f"cannot read the digest map {path}: {err}") from err
        return cls(header.size_bytes, records, header.checksum.hex(), mapped=True)


def write(path: Path, size_bytes: int, records: Records) -> str:
    """Write a new map and fsync it (not yet the directory that names it); returns its checksum.

    records: ascending by cluster. Raises WriteFailed.
    """
    return write_parts(path, size_bytes, len(records), lambda: (records,))


def write_parts(path: Path, size_bytes: int, records: int, parts: Callable[[], Iterable[Records]]) -> str:
    """Write `records` records, as `write` does, which come in parts; `parts` is called twice."""
    head = _HEAD.pack(MAGIC, VERSION, CLUSTER_BYTES, size_bytes, records)
    hasher = blake3(head)
    try:
        for part in parts():
            hasher.update(_bytes(part))
        checksum = hasher.digest(_CHECKSUM_BYTES)
        header = (head + checksum).ljust(_HEADER_BYTES, b"\0")
        durable.write_new(path, header, map(_bytes, parts()))
    except OSError as err:
        raise WriteFailed(str(err.strerror), subject=f"cannot write {path}") from err
    return checksum.hex()


class _Header(NamedTuple):
    """The header of a map. head: its bytes that the checksum covers. records: how many there are."""

    head: bytes
    size_bytes: int
    records: int
    checksum: bytes


def _header(path: Path, file: BufferedReader, named: Named | None) -> _Header:
    """Read the header, and refuse a file that is longer than the disk allows. Raises DamageFound, OSError."""
    content = file.read(_HEADER_BYTES)
    if len(content) != _HEADER_BYTES:
        raise DamageFound(f"the digest map {path} is truncated")
    magic, version, cluster_bytes, size_bytes, records = _HEAD.unpack_from(content)
    if (magic, version, cluster_bytes) != (MAGIC, VERSION, CLUSTER_BYTES):
        raise DamageFound(f"{path} is not a digest map of version {VERSION}")
    checksum = content[_CHECKSUM]
    if named is not None and named != (size_bytes, checksum.hex()):
        raise DamageFound(f"{path} is not the digest map that the manifest names")
    if records > count(size_bytes):
        raise DamageFound(f"the digest map {path} has more records than the disk has clusters")
    length = _HEADER_BYTES + records * RECORD.itemsize
    if (found := os.fstat(file.fileno()).st_size) != length:
        raise DamageFound(f"the digest map {path} has {found} bytes; its header says {length}")
    if any(content[_CHECKSUM.stop :]):
        raise _disagrees(path)
    return _Header(content[: _HEAD.size], size_bytes, records, checksum)


def _check_records(path: Path, file: BufferedReader, header: _Header, check: Callable[[], None]) -> Records:
    """Read and check all records, a piece at a time; return the last piece.

    Not through a mapping: there a disk error would be a SIGBUS.
    """
    hasher = blake3(header.head)
    before, ordered = -1, True
    records: Records = np.empty(0, RECORD)
    for first in range(0, header.records, _PIECE_RECORDS):
        check()
        wanted = min(_PIECE_RECORDS, header.records - first)
        content = file.read(wanted * RECORD.itemsize)
        if len(content) != wanted * RECORD.itemsize:
            raise DamageFound(f"the digest map {path} is truncated")
        hasher.update(content)
        records = np.frombuffer(content, RECORD)
        numbers = records["cluster"]
        ordered = ordered and int(numbers[0]) > before and bool(np.all(numbers[1:] > numbers[:-1]))
        before = int(numbers[-1])
    if hasher.digest(_CHECKSUM_BYTES) != header.checksum:
        raise _disagrees(path)
    if not ordered or before >= count(header.size_bytes):
        raise DamageFound(f"the records of the digest map {path} are out of order")
    return records


def _disagrees(path: Path) -> DamageFound:
    return DamageFound(f"the digest map {path} does not match its checksum")


def _records(file: BufferedReader, records: int) -> Records:
    """Map the records, or read them where the file cannot be mapped. Raises OSError, MemoryError."""
    length = _HEADER_BYTES + records * RECORD.itemsize
    found: Any = None
    # Shared first: a private mapping counts as committed memory.
    for access in (mmap.ACCESS_READ, mmap.ACCESS_COPY):
        with suppress(OSError):
            found = mmap.mmap(file.fileno(), length, access=access)
            break
    if found is None:
        file.seek(0)
        found = file.read(length)
    mapped = np.frombuffer(found, RECORD, records, _HEADER_BYTES)
    mapped.setflags(write=False)
    return mapped


def _bytes(records: Records) -> memoryview:
    return np.ascontiguousarray(records, RECORD).view(np.uint8).data
