# SPDX-License-Identifier: GPL-2.0-or-later
"""Logical volumes of LVM2 whose extents lie one after the other on physical volumes ("linear").

Sources: lvm2, lib/format_text/layout.h (label, areas of metadata) and the text that `vgcfgbackup` writes.
Striped, mirrored, thin and cached volumes are named and not read.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from backupctl.errors import FilesystemError
from backupctl.filesystems import lvm_text
from backupctl.filesystems.device import Device, check_bounds
from backupctl.filesystems.lvm_text import Section

_SECTOR = 512
_LABEL_SECTORS = 4
_LABEL = struct.Struct("<8sQII8s")
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_AREA_BYTES = 512
_CRC_START = 0xF597A6CF
_MOST_AREAS = 8
_MOST_TEXT_BYTES = 4 << 20
_MOST_EXTENT_SECTORS = 1 << 33
_MOST_SEGMENTS = 100_000


@dataclass(frozen=True)
class Volume:
    """A logical volume. name: as VG/LV. device: None if it cannot be read; problem says why."""

    name: str
    size: int
    device: Device | None
    problem: str = ""


@dataclass(frozen=True)
class _Piece:
    """A part of a volume: where it begins there, its length, and where it is."""

    begin: int
    size: int
    device: Device
    offset: int


@dataclass(frozen=True)
class _Linear:
    """A device that is made of pieces, in order, without gaps."""

    size: int
    pieces: tuple[_Piece, ...]

    def read(self, offset: int, length: int) -> bytes:
        check_bounds(self.size, offset, length)
        found = bytearray()
        for piece in self.pieces:
            begin, end = max(offset, piece.begin), min(offset + length, piece.begin + piece.size)
            if begin < end:
                found += piece.device.read(piece.offset + begin - piece.begin, end - begin)
        return bytes(found)


def volumes(physical: Sequence[Device]) -> list[Volume]:
    """Return the volumes of all groups that these physical volumes belong to. Raises FilesystemError.

    A group is described on each of its physical volumes; the description with the largest number counts.
    """
    devices = {_uuid(device): device for device in physical}
    groups: dict[str, tuple[int, Section]] = {}
    for device in physical:
        name, group = _description(device)
        number = lvm_text.number(group, "seqno")
        if name not in groups or groups[name][0] < number:
            groups[name] = (number, group)
    return [one for name, (_, group) in sorted(groups.items()) for one in _of_group(name, group, devices)]


def _label(device: Device) -> bytes:
    """Return the header of a physical volume, which follows its label."""
    for sector in range(_LABEL_SECTORS):
        content = device.read(sector * _SECTOR, _SECTOR)
        magic, number, checksum, offset, kind = _LABEL.unpack_from(content)
        if (magic, number, kind) == (b"LABELONE", sector, b"LVM2 001"):
            if _crc(content[20:]) != checksum or not 32 <= offset <= _SECTOR - 40:
                break
            return content[offset:]
    raise FilesystemError("the label of a physical volume (LVM) is damaged")


def _uuid(device: Device) -> str:
    return _label(device)[:32].decode("ascii", "replace")


def _description(device: Device) -> tuple[str, Section]:
    """Return name and description of the group of a physical volume."""
    for offset, size in _areas(_label(device)):
        header = device.read(offset, _AREA_BYTES)
        checksum, magic, _, start, length = struct.unpack_from("<I16sIQQ", header)
        place, used, text_sum, flags = struct.unpack_from("<QQII", header, 40)
        right = magic == _AREA_MAGIC and _crc(header[4:]) == checksum and (start, length) == (offset, size)
        if not right or flags & 1 or not _AREA_BYTES <= place < size or not 0 < used <= _MOST_TEXT_BYTES:
            continue
        text = _text(device, offset, size, place, used)
        if _crc(text) == text_sum:
            return lvm_text.group(text)
    raise FilesystemError("the description of a volume group (LVM) is damaged, or on another disk")


def _text(device: Device, offset: int, size: int, place: int, used: int) -> bytes:
    """Read a text out of an area, which is written round and round behind its header."""
    first = min(used, size - place)
    return device.read(offset + place, first) + device.read(offset + _AREA_BYTES, used - first)


def _areas(header: bytes) -> list[tuple[int, int]]:
    """Return offset and size of the areas of metadata; those of data come first, then zeroes."""
    found: list[tuple[int, int]] = []
    lists, at = 0, 40
    while at + 16 <= len(header) and lists < 2 and len(found) < _MOST_AREAS:
        offset, size = struct.unpack_from("<QQ", header, at)
        at += 16
        if not offset:
            lists += 1
        elif lists == 1:
            found.append((offset, size))
    return found


def _of_group(name: str, group: Section, devices: dict[str, Device]) -> list[Volume]:
    extent = lvm_text.number(group, "extent_size")
    if not 0 < extent <= _MOST_EXTENT_SECTORS:
        raise FilesystemError(f"the extents of the volume group {name:.60} have an impossible size")
    physical = lvm_text.sections(group, "physical_volumes")
    found = []
    for volume, content in sorted(lvm_text.sections(group, "logical_volumes").items()):
        if "VISIBLE" not in lvm_text.texts(content, "status"):
            continue
        try:
            device = _linear(content, extent * _SECTOR, physical, devices)
            found.append(Volume(f"{name}/{volume}", device.size, device))
        except FilesystemError as err:
            found.append(Volume(f"{name}/{volume}", 0, None, err.message))
    return found


def _linear(
    volume: Section, extent: int, physical: dict[str, Section], devices: dict[str, Device]
) -> _Linear:
    count = lvm_text.number(volume, "segment_count")
    if not 0 < count <= _MOST_SEGMENTS:
        raise FilesystemError("an impossible number of segments")
    pieces: list[_Piece] = []
    end = 0
    for number in range(1, count + 1):
        segment = lvm_text.section(volume, f"segment{number}")
        kind = lvm_text.text(segment, "type")
        if kind != "striped" or lvm_text.number(segment, "stripe_count") != 1:
            raise FilesystemError(f"LVM volumes of the type {kind:.30} are not supported")
        name, first = lvm_text.stripe(segment)
        size = lvm_text.number(segment, "extent_count") * extent
        if lvm_text.number(segment, "start_extent") * extent != end or size <= 0:
            raise FilesystemError("its segments are not in order")
        device, begin = _physical(name, physical, devices)
        check_bounds(device.size, begin + first * extent, size)
        pieces.append(_Piece(end, size, device, begin + first * extent))
        end += size
    return _Linear(end, tuple(pieces))


def _physical(name: str, physical: dict[str, Section], devices: dict[str, Device]) -> tuple[Device, int]:
    if name not in physical:
        raise FilesystemError(f"a segment is on {name:.60}, which is not described")
    device = devices.get(lvm_text.text(physical[name], "id").replace("-", ""))
    if device is None:
        raise FilesystemError(f"its physical volume {name:.60} is not on a disk of this point")
    return device, lvm_text.number(physical[name], "pe_start") * _SECTOR


def _crc(content: bytes) -> int:
    """Return LVM's checksum: that of zlib, with another start and without inversion."""
    return zlib.crc32(content, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
