# SPDX-License-Identifier: GPL-2.0-or-later
"""Scratch files: where QEMU keeps the old content of what the guest overwrites during a run.

An empty qcow2 without a name: the kernel frees it when the last process has ended, and QEMU, which gets it
as a descriptor, needs no rights on the directory. Where descriptors can't be passed (a monitor over TCP,
qemu-storage-daemon) it is a named file in a private directory, which recovery finds by its name.
"""

import ctypes
import errno
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import Failed
from backupctl.names import NodeName
from backupctl.system.files import free_bytes
from backupctl.vm.qmp import empty_qcow2, reply
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.scratch_directory import LOW_BYTES

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP_SIZE = 1  # of fallocate(2): the size goes on telling how much is used


@dataclass(frozen=True)
class Scratch:
    """One disk's scratch file.

    filename: what QEMU opens. descriptor: ours, by which others see how much of it is used.
    reserved: whether its space is allocated, so that nobody else can take it.
    """

    filename: str
    descriptor: int
    reserved: bool


class ScratchFiles:
    """The scratch files of one run, one for each disk, and our descriptors of them.

    monitor: None where nobody needs descriptors, since the files have names. directory: where they go.
    private: a directory of the run for named files; None where descriptors can be passed. After `close` the
    files are QEMU's alone.
    """

    def __init__(self, monitor: Monitor | None, directory: Path, private: Path | None) -> None:
        self.directory = directory
        self.made: list[Scratch] = []
        self._monitor = monitor
        self._private = private

    def make(self, node: NodeName, size: int, reserve_bytes: int) -> Scratch:
        """Make an empty qcow2 of `size` bytes, reserve space for it, and pass it to QEMU.

        node: its name becomes the descriptor set's label, by which recovery knows it. Raises Failed,
        MonitorError.
        """
        if self._private is not None:
            path = self._private / f"{node}.qcow2"
            descriptor = _named(path)
        else:
            descriptor = _nameless(self.directory)
        try:
            _format(descriptor, size, self.directory)
            reserved = _reserve(descriptor, reserve_bytes, self.directory)
            filename = str(path) if self._private is not None else self._hand_over(descriptor, node)
        except BaseException:
            os.close(descriptor)
            raise
        self.made.append(Scratch(filename, descriptor, reserved))
        return self.made[-1]

    def check(self) -> None:
        """Raise Failed when space that could not be reserved becomes scarce."""
        if not all(one.reserved for one in self.made):
            _check_left(self.directory)

    def empty(self) -> None:
        """Free the space of the files; no node may use them any more. Never raises.

        A paused VM keeps its descriptors, whatever it is told (before QEMU 9.1), and with them the space.
        """
        for one in self.made:
            with suppress(OSError):
                os.ftruncate(one.descriptor, 0)

    def close(self) -> None:
        """Close our descriptors. Never raises."""
        for one in self.made:
            with suppress(OSError):
                os.close(one.descriptor)
        self.made.clear()

    def _hand_over(self, descriptor: int, node: NodeName) -> str:
        assert self._monitor is not None
        self._monitor.send_fd(descriptor)
        made = self._monitor.execute("add-fd", {"opaque": node})
        with reply.understood("add-fd"):  # it becomes part of a path
            return f"/dev/fdset/{reply.number(made['fdset-id'])}"


def _check_left(directory: Path) -> None:
    left = free_bytes(directory)
    if left < LOW_BYTES:
        raise Failed(
            f"the file system of the scratch directory {directory} is filling up ({left >> 20} MiB left): "
            "gave up before the guest's own writes could fail"
        )


def _reserve(descriptor: int, reserve_bytes: int, directory: Path) -> bool:
    """Allocate space behind the end of a file; whether its file system can. Raises Failed."""
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    while library.fallocate(descriptor, _KEEP_SIZE, 0, reserve_bytes):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            why = os.strerror(number)
            raise Failed(
                f"{reserve_bytes >> 20} MiB cannot be reserved in the scratch directory {directory}: {why}"
            )
    return True


def _named(path: Path) -> int:
    try:
        return os.open(path, _NEW, 0o600)
    except OSError as err:
        raise Failed(f"cannot create the scratch file {path}: {err.strerror}") from err


def _nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise Failed(f"cannot create a scratch file in {directory}: {err.strerror}") from err
    try:  # a file system without O_TMPFILE: the name lives for an instant only
        descriptor, name = tempfile.mkstemp(prefix="backupctl-", dir=directory)
        Path(name).unlink()
        return descriptor
    except OSError as err:
        raise Failed(f"cannot create a scratch file in {directory}: {err.strerror}") from err


def _format(descriptor: int, size: int, directory: Path) -> None:
    try:
        empty_qcow2.write(descriptor, size)
    except OSError as err:
        raise Failed(f"cannot write a scratch file in {directory}: {err.strerror}") from err
