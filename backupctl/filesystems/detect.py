# SPDX-License-Identifier: GPL-2.0-or-later
"""What a partition holds, by the magic numbers that each kind has at a place of its own.

Only these kinds are known, each is read strictly, and nothing but our own code reads them. So what a guest
writes there cannot lead to anything but an error.
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
_MAGICS: tuple[tuple[str, int, bytes], ...] = (
    (EXT, 1024 + 56, b"\x53\xef"),
    (XFS, 0, b"XFSB"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    (LVM, 512 + 24, b"LVM2 001"),
    ("btrfs", 65536 + 64, b"_BHRfS_M"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("RAID", 4096, b"\xfc\x4e\x2b\xa9"),
    (FAT, 54, b"FAT"),
    (FAT, 82, b"FAT32"),
)


def kind(device: Device) -> str:
    """Return the name of what a device holds; "" if it is not known."""
    for name, offset, magic in _MAGICS:
        if offset + len(magic) <= device.size and device.read(offset, len(magic)) == magic:
            return name
    return ""


def open_file_system(device: Device) -> FileSystem:
    """Open the file system on a device. Raises FilesystemError."""
    found = kind(device)
    if found == EXT:
        return ExtFileSystem(device)
    if found == FAT:
        return FatFileSystem(device)
    if found == XFS:
        return XfsFileSystem(device)
    raise FilesystemError(f"{found} is not supported" if found else "no known file system")
