# SPDX-License-Identifier: GPL-2.0-or-later
"""Partition tables, GPT and MBR with logical partitions, read strictly.

Sources: UEFI specification 2.10, chapter 5; the layout of the MBR in its section 5.2.1. The backup GPT at the
end of a disk is not read: a disk whose first one is damaged needs the tools of its administrator.
"""

import struct
import zlib
from dataclasses import dataclass

from backupctl.errors import FilesystemError
from backupctl.filesystems.device import Device, Slice

_SECTORS = (512, 4096)
_GPT = struct.Struct("<12xII4x32x16xQIII")  # header's length and CRC; the entries' place, number, size, CRC
_GPT_MAGIC = b"EFI PART"
_GPT_MOST_ENTRIES = 1024
_MBR_TABLE, _MBR_SIGNATURE = 446, b"\x55\xaa"
_MBR_ENTRY = struct.Struct("<B3xB3xII")
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_MOST_LOGICAL = 60
_FIRST_LOGICAL = 5


@dataclass(frozen=True)
class Partition:
    """One partition. number: as Linux counts; 0 for a disk without a table, which is one as a whole."""

    number: int
    device: Device


def read(disk: Device) -> tuple[Partition, ...]:
    """Return the partitions of a disk, or the disk itself if it has none. Raises FilesystemError."""
    if disk.size < 2 * max(_SECTORS):
        return (Partition(0, disk),)
    boot = disk.read(0, 512)
    for sector in _SECTORS:
        if disk.read(sector, 8) == _GPT_MAGIC:
            return _gpt(disk, sector)
    if boot[510:512] != _MBR_SIGNATURE or _is_boot_sector(boot):
        return (Partition(0, disk),)
    if any(kind == _PROTECTIVE for kind, _, _ in _mbr_entries(boot)):
        raise FilesystemError("the partition table (GPT) is damaged")
    return _mbr(disk, boot) or (Partition(0, disk),)


def _is_boot_sector(boot: bytes) -> bool:
    """Whether a disk begins with a file system that has the signature of an MBR too: FAT or NTFS."""
    sector = int.from_bytes(boot[11:13], "little")
    named = boot[3:11] == b"NTFS    " or boot[54:57] == b"FAT" or boot[82:87] == b"FAT32"
    return named and sector in (512, 1024, 2048, 4096) and boot[0] in (0xEB, 0xE9)


def _gpt(disk: Device, sector: int) -> tuple[Partition, ...]:
    header = disk.read(sector, sector)
    length, checksum, first, count, size, table_sum = _GPT.unpack_from(header)
    if not 92 <= length <= sector or zlib.crc32(header[:16] + bytes(4) + header[20:length]) != checksum:
        raise FilesystemError("the partition table (GPT) is damaged: its header has a wrong checksum")
    if size < 128 or size > 4096 or size % 8 or count > _GPT_MOST_ENTRIES:
        raise FilesystemError("the partition table (GPT) is damaged: its entries have an impossible size")
    table = disk.read(first * sector, count * size)
    if zlib.crc32(table) != table_sum:
        raise FilesystemError("the partition table (GPT) is damaged: its entries have a wrong checksum")
    found = []
    for number in range(count):
        entry = table[number * size : (number + 1) * size]
        if any(entry[:16]):
            begin, last = struct.unpack_from("<QQ", entry, 32)
            found.append(_partition(disk, number + 1, begin * sector, (last - begin + 1) * sector))
    return tuple(found)


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int]]:
    """Return kind, first sector and number of sectors of the four entries."""
    entries = []
    for number in range(4):
        _, kind, begin, count = _MBR_ENTRY.unpack_from(sector, _MBR_TABLE + 16 * number)
        entries.append((kind, begin, count))
    return entries


def _mbr(disk: Device, boot: bytes) -> tuple[Partition, ...]:
    found = []
    for number, (kind, begin, count) in enumerate(_mbr_entries(boot), 1):
        if kind in _EXTENDED:
            found += _logical(disk, begin)
        elif kind and count:
            found.append(_partition(disk, number, begin * 512, count * 512))
    return tuple(sorted(found, key=lambda one: one.number))


def _logical(disk: Device, extended: int) -> list[Partition]:
    """Follow the chain of an extended partition. A chain that leads back must not be followed for ever."""
    found: list[Partition] = []
    at, seen = extended, set[int]()
    while at not in seen:
        seen.add(at)
        sector = disk.read(at * 512, 512)
        if sector[510:512] != _MBR_SIGNATURE or len(seen) > _MOST_LOGICAL:
            raise FilesystemError("the partition table is damaged: its extended partition has no end")
        (kind, begin, count), (link, following, _), *_ = _mbr_entries(sector)
        if kind and count:
            found.append(_partition(disk, _FIRST_LOGICAL + len(found), (at + begin) * 512, count * 512))
        if link not in _EXTENDED or not following:
            return found
        at = extended + following
    raise FilesystemError("the partition table is damaged: its extended partition has no end")


def _partition(disk: Device, number: int, begin: int, size: int) -> Partition:
    if begin <= 0 or size <= 0 or begin + size > disk.size:
        raise FilesystemError(f"the partition table is damaged: partition {number} is not within the disk")
    return Partition(number, Slice(disk, begin, size))
