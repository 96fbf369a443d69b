# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of one run that QEMU opens by their names: scratch files, and the socket of the export.

They are on libvirt's machine, see `run_directory`.
"""

import socket
from pathlib import Path
from typing import Protocol

from backupctl.names import Namespace, NodeName, VmName
from backupctl.vm.libvirt import run_directory
from backupctl.vm.libvirt.run_directory import QemuUser
from backupctl.vm.qmp.files import LOCAL, Files
from backupctl.vm.qmp.scratch import Scratch, ScratchFiles


class RunHost(Protocol):
    """Where such files are: see the functions of `run_directory`."""

    @property
    def files(self) -> Files:
        """The file system there."""

    def check_run_directory(self, directory: Path, prefix: str, qemu_user: QemuUser | None) -> None:
        """See `run_directory.check`."""

    def make_run_directory(
        self, namespace: Namespace, vm: VmName, directory: Path, qemu_user: QemuUser | None
    ) -> Path:
        """See `run_directory.make`."""

    def give(self, descriptor: int, qemu_user: QemuUser | None) -> None:
        """See `run_directory.give`."""

    def connect_nbd(self, path: Path, qemu_user: QemuUser | None) -> socket.socket:
        """See `run_directory.connect`."""


class LocalRunHost:
    """See `RunHost`: this machine."""

    @property
    def files(self) -> Files:
        """Those of this machine."""
        return LOCAL

    def check_run_directory(self, directory: Path, prefix: str, qemu_user: QemuUser | None) -> None:
        """Look at the directories."""
        run_directory.check(directory, prefix, qemu_user)

    def make_run_directory(
        self, namespace: Namespace, vm: VmName, directory: Path, qemu_user: QemuUser | None
    ) -> Path:
        """Make it."""
        return run_directory.make(namespace, vm, directory, qemu_user)

    def give(self, descriptor: int, qemu_user: QemuUser | None) -> None:
        """Change the owner."""
        run_directory.give(descriptor, qemu_user)

    def connect_nbd(self, path: Path, qemu_user: QemuUser | None) -> socket.socket:
        """Connect."""
        return run_directory.connect(path, qemu_user)


class RunFiles:
    """The files of one run; recovery removes them. qemu_user: of QEMU; None if it is ours too."""

    def __init__(
        self,
        namespace: Namespace,
        vm: VmName,
        directory: Path,
        qemu_user: QemuUser | None,
        host: RunHost | None = None,
    ) -> None:
        self._qemu_user = qemu_user
        self._host: RunHost = host or LocalRunHost()
        self.directory = self._host.make_run_directory(namespace, vm, directory, qemu_user)
        self._scratch = ScratchFiles(None, directory, self.directory, self._host.files)
        self.socket = self.directory / run_directory.SOCKET

    def scratch(self, target: str) -> Path:
        """Return where the scratch file of a disk is."""
        return self.directory / f"{target}.qcow2"

    def make_scratch(self, target: str, size: int, reserve_bytes: int) -> Scratch:
        """Make a disk's scratch file, an empty qcow2 whose space is allocated. Raises Failed."""
        made = self._scratch.make(NodeName(target), size, reserve_bytes)
        self._host.give(made.descriptor, self._qemu_user)
        return made

    def used_bytes(self, one: Scratch) -> int:
        """Return how much of a scratch file holds data. Raises MonitorError if its host is out of reach."""
        return self._scratch.used_bytes(one)

    def connect(self) -> socket.socket:
        """Connect to the export. Raises Failed."""
        return self._host.connect_nbd(self.socket, self._qemu_user)

    def check(self) -> None:
        """Raise Failed when space that could not be reserved becomes scarce."""
        self._scratch.check()

    def close(self) -> None:
        """Close our descriptors. Never raises."""
        self._scratch.close()
