# SPDX-License-Identifier: GPL-2.0-or-later
"""Scratch files: where QEMU keeps the old content of what the guest overwrites during a run.

An empty qcow2 without a name: the kernel frees it whatever dies, and QEMU, which gets it as a
descriptor, needs no rights on the folder. Where descriptors can't be passed (a monitor over TCP,
qemu-storage-daemon) it is a named file in a private folder, which recovery finds by its name.
"""

import errno
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import Failed, Refused
from backupctl.names import NodeName, Owner, VmName
from backupctl.vm import reply
from backupctl.vm.monitor import Monitor

RESERVE_BYTES = 256 * 1024 * 1024
"""A run starts only with this much room, and is given up when less than half of it is left."""


@dataclass(frozen=True)
class Scratch:
    """One disk's scratch file.

    filename: what QEMU opens. descriptor: ours, kept open to watch its size; -1 for a named file.
    """

    filename: str
    descriptor: int

    def close(self) -> None:
        """Let go of our descriptor; QEMU's own keeps the file."""
        if self.descriptor >= 0:
            with suppress(OSError):
                os.close(self.descriptor)


def check_room(folder: Path) -> None:
    """Refuse a scratch folder that is missing, not writable or nearly full. Raises Refused."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise Refused(
            f"the scratch folder {folder} is not a folder we can write to", state="nothing was touched"
        )
    free = free_bytes(folder)
    if free < RESERVE_BYTES:
        raise Refused(
            f"the scratch folder {folder} has {free >> 20} MiB left; a run needs {RESERVE_BYTES >> 20} MiB, "
            "because the guest's own writes fail when it is full",
            state="nothing was touched",
        )


def check_left(folder: Path) -> None:
    """Give up while there is still room, before the guest's writes could fail. Raises Failed."""
    left = free_bytes(folder)
    if left < RESERVE_BYTES // 2:
        raise Failed(
            f"the scratch folder {folder} is filling up ({left >> 20} MiB left): "
            "gave up before the guest's own writes could fail"
        )


def free_bytes(folder: Path) -> int:
    """Return the room that an ordinary user has on the folder's file system."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def make(monitor: Monitor, node: NodeName, size: int, folder: Path, private: Path | None) -> Scratch:
    """Make an empty qcow2 of `size` bytes and have QEMU know it.

    node: its name becomes the descriptor set's label, by which recovery knows it. private: a folder of
    the run for named files; None where descriptors can be passed. Raises Failed, MonitorError.
    """
    if private is not None:
        path = private / f"{node}.qcow2"
        _format(str(path), size, -1)
        return Scratch(str(path), -1)
    descriptor = _nameless(folder)
    try:
        _format(f"/proc/self/fd/{descriptor}", size, descriptor)
        monitor.send_fd(descriptor)
        made = monitor.execute("add-fd", {"opaque": node})
        with reply.understood("add-fd"):  # it becomes part of a path
            fdset = reply.number(made["fdset-id"])
    except BaseException:
        os.close(descriptor)
        raise
    return Scratch(f"/dev/fdset/{fdset}", descriptor)


def private_folder(owner: Owner, vm: VmName, folder: Path) -> Path:
    """Make the run's folder for named files. Its name tells recovery whose it is."""
    return Path(tempfile.mkdtemp(prefix=_private_prefix(owner, vm), dir=folder))


def sweep(owner: Owner, vm: VmName, folder: Path) -> list[str]:
    """Remove the private folders that dead runs of this VM left. The caller holds the VM's lock."""
    told = []
    if folder.is_dir():
        for entry in os.scandir(folder):
            if entry.name.startswith(_private_prefix(owner, vm)) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
                told.append(f"removed the scratch folder {entry.path}")
    return told


def left_folders(owner: Owner, vm: VmName, folder: Path) -> list[str]:
    """Name the private folders that `sweep` would remove."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.path for entry in os.scandir(folder) if entry.name.startswith(_private_prefix(owner, vm))
    )


def _private_prefix(owner: Owner, vm: VmName) -> str:
    # '@' can't be part of a VM's name, so no VM's prefix is the beginning of another's.
    return f"{owner.node(vm, 0)[:-1]}@"


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise Failed(f"no scratch file can be made in {folder}: {err.strerror}") from err
    try:  # a file system without O_TMPFILE: the name lives for an instant only
        descriptor, name = tempfile.mkstemp(prefix="backupctl-", dir=folder)
        Path(name).unlink()
        return descriptor
    except OSError as err:
        raise Failed(f"no scratch file can be made in {folder}: {err.strerror}") from err


def _format(filename: str, size: int, descriptor: int) -> None:
    done = subprocess.run(
        [os.environ.get("QEMU_IMG", "qemu-img"), "create", "-q", "-f", "qcow2", filename, str(size)],
        pass_fds=(descriptor,) if descriptor >= 0 else (),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise Failed(f"qemu-img can't make a scratch file: {done.stderr.strip():.500}")
