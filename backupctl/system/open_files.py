# SPDX-License-Identifier: GPL-2.0-or-later
"""Which files QEMU's processes on this machine have open, from /proc, where we have the rights to read it.

The file name that QEMU reports may be a relative path, JSON, or a descriptor that was passed to it, and QEMU
may see other mounts than we do. Its open descriptors are the files themselves.
"""

import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from backupctl.names import is_ours
from backupctl.system import private_dir

_EMULATORS = ("qemu-system-", "qemu-kvm")
_SERVERS = ("qemu-storage-da", "qemu-nbd")  # of a name /proc/PID/comm has 15 characters
_LOOP_MAJOR = 7
_STANDARD = frozenset({"0", "1", "2"})
_MOST_ARGUMENT_BYTES = 1 << 19
_DELETED = " (deleted)"
_NAMELESS = re.compile(r"#[0-9]+ \(deleted\)")
"""What the kernel calls a file made with O_TMPFILE."""


@dataclass(frozen=True)
class FileSystem:
    """Where a file takes its space from. device: its number. free_bytes: what is free on it."""

    device: int
    free_bytes: int

    @classmethod
    def of(cls, path: str | Path) -> "FileSystem":
        """Return that of a file or directory. Raises OSError, ValueError."""
        found = os.statvfs(path)
        return cls(os.stat(path).st_dev, found.f_bavail * found.f_frsize)  # noqa: PTH116 - any text

    def shared_with(self, other: "FileSystem") -> bool:
        """Whether two files take their space from one.

        Parts of one pool (btrfs subvolumes, ZFS datasets) have device numbers of their own; they are
        recognised by the same free space, to the byte.
        """
        return self.device == other.device or 0 < self.free_bytes == other.free_bytes


@dataclass(frozen=True)
class OpenFile:
    """A file that a process may write to. path: as the process sees it."""

    file_system: FileSystem
    path: str


def peer(connection: socket.socket) -> int | None:
    """Return the process at the other end of a unix socket; None if the kernel does not say."""
    if connection.family != socket.AF_UNIX:
        return None
    with suppress(OSError, struct.error):
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", found)[0]) or None
    return None


def is_qemu(process: int) -> bool:
    """Whether a process is one of QEMU's, an emulator or a storage daemon."""
    return _is_emulator(process) or _program(process).startswith("qemu-")


def command_line(process: int) -> tuple[str, ...] | None:
    """Return a process's arguments, its program first; None if they cannot be read, or are too long."""
    try:
        with Path(f"/proc/{process}/cmdline").open("rb") as file:
            content = file.read(_MOST_ARGUMENT_BYTES + 1)
    except OSError:
        return None
    if not content or len(content) > _MOST_ARGUMENT_BYTES:
        return None
    return tuple(os.fsdecode(one) for one in content.removesuffix(b"\0").split(b"\0"))


def writers() -> Iterator[tuple[int, str]]:
    """Yield the processes that write to disks of virtual machines, and what each is.

    They are the VMs themselves, and the storage daemons and qemu-nbd that serve disks to them, or to anybody
    else. Our own daemons are left out: those who start them watch what they fill.
    """
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        process = int(entry.name)
        if _is_emulator(process):
            yield process, "VM"
        elif _program(process).startswith(_SERVERS) and not _is_our_daemon(process):
            yield process, "disk server"


def written(process: int) -> tuple[OpenFile, ...] | None:
    """Return the files that a process may write to; None if we have no right to look.

    Scratch files and its standard descriptors are left out.
    """
    try:
        with os.scandir(f"/proc/{process}/fd") as entries:
            descriptors = {entry.name for entry in entries} - _STANDARD
    except FileNotFoundError:
        return ()
    except OSError:
        return None
    found = (_written(process, name) for name in descriptors)
    return tuple(one for one in found if one is not None)


def descriptor(process: int, number: int) -> int:
    """Open a scratch file again that a process has open for writing as this descriptor.

    Any other file is refused: QEMU's memory may be a file without a name, too. The caller closes the
    descriptor. Raises OSError.
    """
    path = f"/proc/{process}/fd/{number}"
    if not _may_write(process, str(number)) or not _is_scratch(os.readlink(path)):  # noqa: PTH115
        raise PermissionError(f"the descriptor {number} of the process {process} is not a scratch file")
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    found = os.fstat(opened)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink:
        os.close(opened)
        raise FileNotFoundError(f"the descriptor {number} of the process {process} has a name")
    return opened


def _is_emulator(process: int) -> bool:
    program = _program(process)
    return program == "kvm" or program.startswith(_EMULATORS)


def _is_our_daemon(process: int) -> bool:
    arguments = command_line(process) or ()
    return any(
        option == "--pidfile" and private_dir.is_in_one(Path(value)) for option, value in pairwise(arguments)
    )


def _program(process: int) -> str:
    directory = Path("/proc", str(process))
    try:
        return (directory / "exe").readlink().name.removesuffix(_DELETED)
    except PermissionError:  # another user's process
        with suppress(OSError):
            return (directory / "comm").read_text(errors="replace").strip()
    except OSError:  # a kernel thread, or the process has ended
        pass
    return ""


def _written(process: int, name: str) -> OpenFile | None:
    path = f"/proc/{process}/fd/{name}"
    with suppress(OSError):  # it may have been closed since
        file_system, link = _file_system(path), os.readlink(path)  # noqa: PTH115
        if file_system is not None and not _is_scratch(link) and _may_write(process, name):
            return OpenFile(file_system, link)
    return None


def _file_system(path: str) -> FileSystem | None:
    """Return where a write to a file takes space; None if nowhere. Raises OSError."""
    found = os.stat(path)  # noqa: PTH116
    if stat.S_ISREG(found.st_mode):
        return FileSystem.of(path)
    if stat.S_ISBLK(found.st_mode) and os.major(found.st_rdev) == _LOOP_MAJOR:
        behind = Path(f"/sys/dev/block/{_LOOP_MAJOR}:{os.minor(found.st_rdev)}/loop/backing_file")
        return FileSystem.of(behind.read_text().strip())
    return None


def _may_write(process: int, name: str) -> bool:
    with open(f"/proc/{process}/fdinfo/{name}", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        flags = next((line.split()[1] for line in file if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _is_scratch(link: str) -> bool:
    """Whether a file is a run's scratch file, itself or by its directory.

    Its space is preallocated, so its growth takes none.
    """
    path, _, name = link.rpartition("/")
    directory = path.rpartition("/")[2]
    return bool(_NAMELESS.fullmatch(name)) or is_ours(name) or (is_ours(directory) and "@" in directory)
