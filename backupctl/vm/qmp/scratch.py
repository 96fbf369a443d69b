# SPDX-License-Identifier: GPL-2.0-or-later
"""Scratch files: where QEMU keeps the old content of what the guest overwrites during a run.

An empty qcow2 without a name: the kernel frees it when the last process has ended, and QEMU, which gets it
as a descriptor, needs no rights on the directory. Where descriptors can't be passed (a monitor over TCP,
qemu-storage-daemon) it is a named file in a private directory, which recovery finds by its name.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import BackupctlError, Failed
from backupctl.names import NodeName
from backupctl.vm.qmp import reply
from backupctl.vm.qmp.files import LOCAL, Files
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.scratch_directory import LOW_BYTES


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
    private: a directory of the run for named files; None where descriptors can be passed. files: those of the
    machine that QEMU runs on. After `close` the files are QEMU's alone.
    """

    def __init__(
        self, monitor: Monitor | None, directory: Path, private: Path | None, files: Files = LOCAL
    ) -> None:
        self.directory = directory
        self.made: list[Scratch] = []
        self._monitor = monitor
        self._private = private
        self._files = files

    def make(self, node: NodeName, size: int, reserve_bytes: int) -> Scratch:
        """Make an empty qcow2 of `size` bytes, reserve space for it, and pass it to QEMU.

        node: its name becomes the descriptor set's label, by which recovery knows it. Raises Failed,
        MonitorError.
        """
        path = None if self._private is None else self._private / f"{node}.qcow2"
        made = self._files.make_scratch(self.directory, path, size, reserve_bytes)
        try:
            filename = str(path) if path is not None else self._hand_over(made.descriptor, node)
        except BaseException:
            self._files.close(made.descriptor)
            raise
        self.made.append(Scratch(filename, made.descriptor, made.reserved))
        return self.made[-1]

    def check(self) -> None:
        """Raise Failed when space that could not be reserved becomes scarce."""
        if not all(one.reserved for one in self.made):
            _check_left(self.directory, self._files)

    def used_bytes(self, one: Scratch) -> int:
        """Return how much of a file holds data. Raises MonitorError if its host is out of reach."""
        return self._files.used_bytes(one.descriptor)

    def empty(self) -> None:
        """Free the space of the files; no node may use them any more. Never raises.

        A paused VM keeps its descriptors, whatever it is told (before QEMU 9.1), and with them the space.
        """
        for one in self.made:
            with suppress(OSError, BackupctlError):
                self._files.empty(one.descriptor)

    def close(self) -> None:
        """Close our descriptors. Never raises."""
        for one in self.made:
            with suppress(OSError, BackupctlError):
                self._files.close(one.descriptor)
        self.made.clear()

    def _hand_over(self, descriptor: int, node: NodeName) -> str:
        assert self._monitor is not None
        self._monitor.send_fd(descriptor)
        made = self._monitor.execute("add-fd", {"opaque": node})
        with reply.understood("add-fd"):  # it becomes part of a path
            return f"/dev/fdset/{reply.number(made['fdset-id'])}"


def _check_left(directory: Path, files: Files) -> None:
    left = files.free_bytes(directory)
    if left < LOW_BYTES:
        raise Failed(
            f"the file system of the scratch directory {directory} is filling up ({left >> 20} MiB left): "
            "gave up before the guest's own writes could fail"
        )
