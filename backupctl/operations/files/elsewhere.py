# SPDX-License-Identifier: GPL-2.0-or-later
"""What reads the files that we do not read: commands of others, in which no guest reaches the host.

guestmount and guestfish (packages guestmount and guestfish) read a file system with a kernel of its own, in a
small VM. They are not called from here, since they start QEMU with all rights of their caller.
"""

from collections.abc import Iterable

from backupctl.filesystems import detect

_OTHERS = (
    "`backupctl mount` shows each disk as a file DIR/DISK.raw; then guestmount --ro --format=raw "
    "-a DIR/DISK.raw -m /dev/sdaN /mnt (package guestmount) reads partition N in a small VM; "
    "/dev/sda without N is a disk without partitions"
)
_ADVICE = {
    detect.LUKS: "encrypted in the guest. With its passphrase: `backupctl mount`, then guestfish --ro "
    "--format=raw -a DIR/DISK.raw -i (package guestfish) asks for it",
    detect.BITLOCKER: "encrypted in the guest. With its key: `backupctl mount`, then guestfish --ro "
    "--format=raw -a DIR/DISK.raw -i (package guestfish, version 1.46 or later) asks for it",
    detect.RAID: "`backupctl mount` shows each disk as a file DIR/DISK.raw; then guestfish --ro --format=raw "
    "-a DIR/DISK.raw -i (package guestfish), with -a for each disk of the array, reads it in a small VM",
    detect.LVM: "`backupctl mount` shows each disk as a file DIR/DISK.raw; then guestmount --ro --format=raw "
    "-a DIR/DISK.raw -m /dev/VG/LV /mnt (package guestmount), with -a for each disk of the volume group, "
    "reads it in a small VM",
    detect.ZFS: "boot a VM without a network that knows ZFS from overlays on the point: "
    "`backupctl restore NAME POINT --to DIR/ --thin`, or attach them to another such VM",
    detect.REFS: "attach an overlay on the point to a VM with Windows: "
    "`backupctl restore NAME POINT --to DIR/ --thin`",
    detect.SWAP: "it has no files",
    detect.EMPTY: "it has no files",
    "": "if it holds a file system nevertheless: " + _OTHERS,
}


def advice(unread: Iterable[tuple[str, bool]]) -> tuple[tuple[str, str], ...]:
    """Return what to do about each kind that is not read, without saying anything twice.

    unread: kinds, each with whether it is on a logical volume.
    """
    by_advice: dict[str, list[str]] = {}
    for kind, on_volume in dict.fromkeys(unread):
        text = _ADVICE.get(kind) if kind else None
        text = text or (_ADVICE[detect.LVM] if on_volume else _ADVICE.get(kind, _OTHERS))
        by_advice.setdefault(text, []).append(kind or ("LVM" if on_volume else "unknown"))
    return tuple((", ".join(names), text) for text, names in by_advice.items())
