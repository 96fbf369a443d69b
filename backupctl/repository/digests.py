# SPDX-License-Identifier: GPL-2.0-or-later
"""The digest map: what a layer stores, cluster by cluster, as it was when it was READ from the VM.

``POINT/<disk>.digests``, little endian::

     0   8  magic "bkdigest"
     8   4  version, 1
    12   4  bytes in a cluster, 65536
    16   8  virtual size of the disk in bytes
    24   8  count of records
    32  16  BLAKE3 cut to 16 bytes, of bytes 0 to 31 and all the records
    48  16  zero
    64      records, 24 bytes each: cluster (8), digest (16), ascending by cluster

A cluster's digest is BLAKE3 cut to 16 bytes, of its 65536 bytes; a short last one is filled up with
zeroes. 16 zero bytes stand for a cluster that is stored as zeroes.
"""

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Self

import numpy as np
from blake3 import blake3

from backupctl.clusters import CLUSTER_BYTES, RECORD, Records, count
from backupctl.errors import DamageFound, WriteFailed
from backupctl.repository import durable, plain

MAGIC = b"bkdigest"
VERSION = 1
_HEAD = struct.Struct("<8sIIQQ")
_HEADER_BYTES = 64
_CHECKSUM = slice(32, 48)
_CHECKSUM_BYTES = 16


def path_of(image: Path) -> Path:
    """Return where the digest map of a layer lies: beside its image."""
    return image.with_suffix(".digests")


def merged_path_of(image: Path) -> Path:
    """Return where the map of a merged layer waits until its image is in place."""
    return image.with_suffix(".digests.merged")


@dataclass(frozen=True)
class DigestMap:
    """A layer's digest map. records: mapped from the file, read-only. checksum: 32 hex digits."""

    size_bytes: int
    records: Records
    checksum: str

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file, after every byte of it was checked. Raises DamageFound, RepositoryError."""
        try:
            with plain.open_file(path) as file:
                header = file.read(_HEADER_BYTES)
                if len(header) != _HEADER_BYTES:
                    raise DamageFound(f"{path} is cut off")
                size_bytes, records = _read(path, file, header)
        except (OSError, ValueError) as err:
            if isinstance(err, OSError):
                plain.refuse_shortage(path, err)
            raise DamageFound(f"the digest map {path} can't be read: {err}") from err
        checksum = _checksum(header[: _HEAD.size], records)
        if header[_CHECKSUM] != checksum or any(header[_CHECKSUM.stop :]):
            raise DamageFound(f"the digest map {path} does not agree with its checksum")
        _refuse_disorder(path, records, size_bytes)
        return cls(size_bytes, records, checksum.hex())


def write(path: Path, size_bytes: int, records: Records) -> str:
    """Write a new map, and bring its content (not yet its name) to the disk; returns its checksum.

    records: ascending by cluster. Raises WriteFailed.
    """
    return write_parts(path, size_bytes, len(records), lambda: (records,))


def write_parts(path: Path, size_bytes: int, records: int, parts: Callable[[], Iterable[Records]]) -> str:
    """Do the same as `write` for so many records that come in parts, which are gone through twice."""
    head = _HEAD.pack(MAGIC, VERSION, CLUSTER_BYTES, size_bytes, records)
    hasher = blake3(head)
    try:
        for part in parts():
            hasher.update(_bytes(part))
        checksum = hasher.digest(_CHECKSUM_BYTES)
        header = (head + checksum).ljust(_HEADER_BYTES, b"\0")
        durable.write_new(path, header, map(_bytes, parts()))
    except OSError as err:
        raise WriteFailed(f"{path} can't be written: {err.strerror}") from err
    return checksum.hex()


def _read(path: Path, file: BufferedReader, header: bytes) -> tuple[int, Records]:
    magic, version, cluster_bytes, size_bytes, records = _HEAD.unpack_from(header)
    if (magic, version, cluster_bytes) != (MAGIC, VERSION, CLUSTER_BYTES):
        raise DamageFound(f"{path} is no digest map of a kind that this backupctl knows")
    if os.fstat(file.fileno()).st_size != _HEADER_BYTES + records * RECORD.itemsize:
        raise DamageFound(f"the digest map {path} has not the length that it should have")
    if not records:  # nothing can't be mapped
        return size_bytes, np.empty(0, RECORD)
    return size_bytes, np.memmap(file, RECORD, "r", offset=_HEADER_BYTES, shape=(records,))


def _refuse_disorder(path: Path, records: Records, size_bytes: int) -> None:
    numbers = records["cluster"]
    if len(records) and (np.any(numbers[1:] <= numbers[:-1]) or numbers[-1] >= count(size_bytes)):
        raise DamageFound(f"the records of the digest map {path} are out of order")


def _checksum(head: bytes, records: Records) -> bytes:
    return blake3(head).update(_bytes(records)).digest(_CHECKSUM_BYTES)


def _bytes(records: Records) -> memoryview:
    return np.ascontiguousarray(records, RECORD).view(np.uint8).data
