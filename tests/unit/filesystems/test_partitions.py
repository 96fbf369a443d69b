# SPDX-License-Identifier: GPL-2.0-or-later
"""Partition tables: those that are right are read, and no other is guessed at."""

import struct
import zlib

import pytest

from backupctl.errors import FilesystemError
from backupctl.filesystems import partitions
from tests.unit.filesystems.sources import Memory

SECTOR = 512
SECTORS = 4096


def blank() -> bytearray:
    return bytearray(SECTORS * SECTOR)


def mbr(*entries: tuple[int, int, int]) -> bytes:
    """Return a sector with entries of kind, first sector and number of sectors."""
    table = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries).ljust(64, b"\0")
    return bytes(446) + table + b"\x55\xaa"


def gpt(*entries: tuple[int, int], sector: int = SECTOR, size: int = 128) -> bytearray:
    disk = bytearray(SECTORS * SECTOR)
    disk[:512] = mbr((0xEE, 1, SECTORS - 1))
    table = b"".join(
        b"\1" * 16 + b"\2" * 16 + struct.pack("<QQ", first, last) + bytes(size - 48)
        for first, last in entries
    ).ljust(4 * size, b"\0")
    head = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        b"EFI PART",
        0x10000,
        92,
        0,
        0,
        1,
        7,
        3,
        400,
        b"g" * 16,
        2,
        4,
        size,
        zlib.crc32(table),
    )
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    disk[sector : sector + len(head)] = head
    disk[2 * sector : 2 * sector + len(table)] = table
    return disk


def places(disk: bytes) -> list[tuple[int, int, int]]:
    return [
        (one.number, getattr(one.device, "begin", 0), one.device.size)
        for one in partitions.read(Memory(bytes(disk)))
    ]


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_gpt_is_read_with_the_sectors_that_it_has(sector):
    disk = gpt((40, 49), (100, 199), sector=sector)
    assert places(disk) == [(1, 40 * sector, 10 * sector), (2, 100 * sector, 100 * sector)]


def test_primary_and_logical_partitions_have_the_numbers_that_linux_gives():
    disk = blank()
    disk[:512] = mbr((0x83, 8, 8), (0, 0, 0), (0x05, 100, 300))
    disk[100 * SECTOR : 101 * SECTOR] = mbr((0x83, 1, 50), (0x05, 100, 60))
    disk[200 * SECTOR : 201 * SECTOR] = mbr((0x83, 2, 30))
    assert places(disk) == [
        (1, 8 * SECTOR, 8 * SECTOR),
        (5, 101 * SECTOR, 50 * SECTOR),
        (6, 202 * SECTOR, 30 * SECTOR),
    ]


def test_a_disk_without_a_table_is_one_place():
    assert places(blank()) == [(0, 0, SECTORS * SECTOR)]


def test_a_gpt_with_a_wrong_checksum_is_refused():
    for at in (SECTOR + 40, 2 * SECTOR + 33):
        disk = gpt((40, 49))
        disk[at] ^= 1
        with pytest.raises(FilesystemError, match="wrong checksum"):
            places(disk)


def test_a_gpt_that_is_gone_is_not_taken_for_an_mbr():
    disk = blank()
    disk[:512] = mbr((0xEE, 1, SECTORS - 1))
    with pytest.raises(FilesystemError, match="GPT"):
        places(disk)


def test_a_partition_beyond_the_disk_is_refused():
    for disk in (gpt((40, SECTORS)), gpt((50, 40)), gpt((0, 40))):
        with pytest.raises(FilesystemError, match="not within the disk"):
            places(disk)
    disk = blank()
    disk[:512] = mbr((0x83, 8, SECTORS))
    with pytest.raises(FilesystemError, match="not within the disk"):
        places(disk)


def test_an_extended_partition_that_leads_back_has_an_end():
    disk = blank()
    disk[:512] = mbr((0x05, 100, 300))
    disk[100 * SECTOR : 101 * SECTOR] = mbr((0x83, 1, 50), (0x05, 50, 60))
    disk[150 * SECTOR : 151 * SECTOR] = mbr((0x83, 1, 5), (0x05, 50, 60))
    with pytest.raises(FilesystemError, match="has no end"):
        places(disk)
