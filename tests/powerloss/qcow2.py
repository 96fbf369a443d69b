# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading plain qcow2 images of ours without QEMU: to look at thousands of them."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

CLUSTER = 65536
_OFFSETS = (1 << 56) - 512
_COMPRESSED = 1 << 62
_ZERO = 1


def clusters(image: bytes) -> dict[int, bytes]:
    """Return the clusters that an image stores itself, by number."""
    entries, first = struct.unpack_from(">IQ", image, 36)
    found = {}
    for number, entry in enumerate(struct.unpack_from(f">{entries}Q", image, first)):
        table = entry & _OFFSETS
        if not table:
            continue
        for index, second in enumerate(struct.unpack(">8192Q", _cluster(image, table))):
            assert not second & _COMPRESSED
            if second & _ZERO:
                found[number * 8192 + index] = bytes(CLUSTER)
            elif second & _OFFSETS:
                found[number * 8192 + index] = _cluster(image, second & _OFFSETS)
    return found


def content(chain: Sequence[Path]) -> bytes:
    """Return what a disk holds, read through a chain of images, newest first."""
    return _content(tuple(_Image.of(path) for path in chain))


@dataclass(frozen=True)
class _Image:
    """A file by its identity: thousands of states are made of links to the same few. path: one of them."""

    path: Path = field(compare=False)
    identity: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: Path) -> "_Image":
        found = path.stat()
        return cls(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=32)
def _content(chain: tuple[_Image, ...]) -> bytes:
    images = [image.path.read_bytes() for image in chain]
    sizes = [struct.unpack_from(">Q", image, 24)[0] for image in images]
    found = bytearray(max(sizes))
    for image, size in zip(reversed(images), reversed(sizes), strict=True):
        found[size:] = bytes(len(found) - size)
        for number, held in clusters(image).items():
            end = min((number + 1) * CLUSTER, size)
            found[number * CLUSTER : end] = held[: max(end - number * CLUSTER, 0)]
    return bytes(found[: sizes[0]])


def _cluster(image: bytes, offset: int) -> bytes:
    return image[offset : offset + CLUSTER].ljust(CLUSTER, b"\0")
