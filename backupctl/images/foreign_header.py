# SPDX-License-Identifier: GPL-2.0-or-later
r"""The header of a qcow2 image that backupctl did not make, read from a descriptor without QEMU.

QEMU opens the files that a header names, with the rights of the user who runs it. So before such an image is
handed to QEMU, and before one is replaced, this reads what its header refers to. Nothing here decides whether
a file is a qcow2 image: that must be known already, because a guest writes the first bytes of a raw disk.

::

    0  magic "QFI\xfb"       8  offset of the backing name    32  kind of encryption
    4  version (2 or 3)     16  length of the backing name    72  incompatible features (version 3)
    20 bits of a cluster    24  virtual size                 100  length of the header (version 3)
    then extensions: type, length, data padded to 8 bytes; they end before the backing name
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ImageFeature = Literal["backing", "data-file", "encryption"]
FEATURES: tuple[ImageFeature, ...] = ("backing", "data-file", "encryption")
"""What makes an image more than one plain file."""

_MAGIC = 0x514649FB
_FIRST = struct.Struct(">IIQIIQI")  # up to the kind of encryption
_VERSION_2_BYTES, _VERSION_3_BYTES = 72, 104
_MOST_CLUSTER_BYTES = 1 << 21
_NAME_BYTES = 1023
_ENCRYPTION, _DATA_FILE = 0x0537BE77, 0x44415441  # types of extensions
_UNCLOSED_BIT, _CORRUPT_BIT, _DATA_FILE_BIT = 1 << 0, 1 << 1, 1 << 2
_KNOWN_BITS = 0b11111  # not closed, corrupt, data file, kind of compression, subclusters


@dataclass(frozen=True)
class ForeignHeader:
    """What an image refers to. size: virtual, in bytes. backing, data_file: names as stored, "" for none.

    corrupt: QEMU marked it so, and opens it read-only. unclosed: its reference counts are "lazy", and not
    valid until QEMU has repaired it.
    """

    size: int
    backing: str
    data_file: str
    corrupt: bool
    features: frozenset[ImageFeature]
    unclosed: bool = False

    def describe(self, feature: ImageFeature) -> str:
        """Describe a feature of the image, in words that follow its name."""
        if feature == "backing":
            return f"is an overlay on the backing file {self.backing!r:.200}"
        if feature == "data-file":
            return f"keeps its data in the external file {self.data_file!r:.200}"
        return "is encrypted"


def read(descriptor: int) -> ForeignHeader:
    """Read the header of an open file. Raises ValueError if QEMU would not open it as a qcow2, OSError."""
    return parse(os.pread(descriptor, _MOST_CLUSTER_BYTES, 0))


def parse(content: bytes) -> ForeignHeader:
    """Read a header from an image's first cluster. Raises ValueError."""
    try:
        return _parse(content)
    except struct.error as err:
        raise ValueError("truncated header") from err


def _parse(content: bytes) -> ForeignHeader:
    magic, version, backing_at, backing_length, bits, size, encryption = _FIRST.unpack_from(content)
    if magic != _MAGIC:
        raise ValueError("no qcow2 magic number")
    incompatible, begin = _version(version, content)
    if not 9 <= bits <= 21 or begin > 1 << bits:
        raise ValueError("invalid size of header or clusters")
    first = content[: 1 << bits]
    backing = _backing(first, backing_at, backing_length)
    found = dict(_extensions(first, begin, backing_at or 1 << bits))
    features = {
        "backing": bool(backing_at),
        "data-file": bool(incompatible & _DATA_FILE_BIT) or _DATA_FILE in found,
        "encryption": bool(encryption) or _ENCRYPTION in found,
    }
    return ForeignHeader(
        size,
        backing,
        found.get(_DATA_FILE, b"").decode(errors="replace"),
        bool(incompatible & _CORRUPT_BIT),
        frozenset(name for name in FEATURES if features[name]),
        bool(incompatible & _UNCLOSED_BIT),
    )


def _version(version: int, content: bytes) -> tuple[int, int]:
    """Return the incompatible features, and where the extensions begin."""
    if version == 2:
        return 0, _VERSION_2_BYTES
    if version != 3:
        raise ValueError(f"version {version}; QEMU knows 2 and 3")
    (incompatible,) = struct.unpack_from(">Q", content, 72)
    (length,) = struct.unpack_from(">I", content, 100)
    if incompatible & ~_KNOWN_BITS:
        raise ValueError(f"unknown incompatible features 0x{incompatible & ~_KNOWN_BITS:x}")
    if length < _VERSION_3_BYTES:
        raise ValueError(f"a header of only {length} bytes")
    return incompatible, length


def _backing(first: bytes, offset: int, length: int) -> str:
    if not offset:
        return ""
    if length > _NAME_BYTES or offset + length > len(first):
        raise ValueError("the backing file's name lies outside the first cluster")
    return first[offset : offset + length].decode(errors="replace")


def _extensions(first: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the header's extensions: type and data."""
    while at < end:
        kind, length = struct.unpack_from(">II", first, at)
        if kind == 0:
            return
        if at + 8 + length > min(end, len(first)):
            raise ValueError("a header extension is longer than the header")
        yield kind, first[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
