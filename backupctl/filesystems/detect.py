# SPDX-License-Identifier: GPL-2.0-or-later
"""What a partition holds, by the magic numbers that each kind has at a place of its own.

All kinds are named, so that a user knows what to read them with. Only ext, XFS and FAT are read, strictly,
and nothing but our own code reads them. So what a guest writes there cannot lead to anything but an error.

The magic numbers are those that blkid(8) knows; that of ZFS is the first name in the list of its label
(ZFS On-Disk Specification, 1.3).
"""

from backupctl.errors import FilesystemError
from backupctl.filesystems.device import Device
from backupctl.filesystems.ext import ExtFileSystem
from backupctl.filesystems.fat import FatFileSystem
from backupctl.filesystems.tree import FileSystem
from backupctl.filesystems.xfs import XfsFileSystem

EXT = "ext2/3/4"
LVM = "LVM"
XFS = "XFS"
FAT = "FAT"
LUKS = "LUKS"
BITLOCKER = "BitLocker"
RAID = "RAID of Linux (md)"
SWAP = "swap"
REFS = "ReFS"
ZFS = "ZFS"
EMPTY = "empty"
_EMPTY_BYTES = 128 << 10
_MAGICS: tuple[tuple[str, int, bytes], ...] = (
    (EXT, 1024 + 56, b"\x53\xef"),
    (XFS, 0, b"XFSB"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    (REFS, 3, b"ReFS\0\0\0\0"),
    (BITLOCKER, 3, b"-FVE-FS-"),
    (LUKS, 0, b"LUKS\xba\xbe"),
    (LVM, 512 + 24, b"LVM2 001"),
    ("btrfs", 65536 + 64, b"_BHRfS_M"),
    (ZFS, 16384 + 24, b"version\0"),
    (SWAP, 4086, b"SWAPSPACE2"),
    (RAID, 4096, b"\xfc\x4e\x2b\xa9"),
    (RAID, 0, b"\xfc\x4e\x2b\xa9"),
    ("ISO 9660", 32768 + 1, b"CD001"),
    ("SquashFS", 0, b"hsqs"),
    ("F2FS", 1024, b"\x10\x20\xf5\xf2"),
    (FAT, 54, b"FAT"),
    (FAT, 82, b"FAT32"),
)


def kind(device: Device) -> str:
    """Return the name of what a device holds: "" if it is not known, EMPTY if it begins with zeroes only."""
    for name, offset, magic in _MAGICS:
        if offset + len(magic) <= device.size and device.read(offset, len(magic)) == magic:
            return name
    return "" if any(device.read(0, min(device.size, _EMPTY_BYTES))) else EMPTY


def open_file_system(device: Device) -> FileSystem:
    """Open the file system on a device. Raises FilesystemError, which names what else is there."""
    found = kind(device)
    if found == EXT:
        return ExtFileSystem(device)
    if found == FAT:
        return FatFileSystem(device)
    if found == XFS:
        return XfsFileSystem(device)
    if found == EMPTY:
        raise FilesystemError(f"empty: it begins with {_EMPTY_BYTES >> 10} KiB of zeroes")
    raise FilesystemError(f"{found} is not supported" if found else "no known file system")
