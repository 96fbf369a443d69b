# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that libvirt and its QEMUs run on: this one, or one that ssh reaches.

The latter is in `vm.remote.libvirt_host`.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from socket import socket
from typing import Protocol

from backupctl.options import LibvirtAccess, Timeouts
from backupctl.system.open_files import FileSystem
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.guest import handshake
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.libvirt import agent
from backupctl.vm.libvirt.connection import Connection, module_directory
from backupctl.vm.libvirt.guard_hands import Hands
from backupctl.vm.libvirt.run_files import LocalRunHost, RunHost

Connection.log = logging.getLogger("backupctl.vm.libvirt").debug

LOCK_SECONDS = 5.0
"""libvirt waits 30 s for another operation to end; we wait a little longer, and have its answer."""


class Host(RunHost, Protocol):
    """What a driver and its session do on libvirt's machine."""

    def connection(self) -> Connection:
        """Return a new connection to the domain. Raises MonitorUnreachable."""

    def guard(self, lock: int) -> AbstractContextManager[GuardClient]:
        """Start a guard there, see `GuardClient.start`. Raises GuardLost, Refused."""

    def thaw_if_frozen(self) -> bool:
        """Thaw a guest that is frozen; whether it was. Raises AgentError."""

    def leave(self, clients: Iterable[socket]) -> None:
        """Have NBD clients leave that are in their handshake, see `handshake.leave`. Never raises."""

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:
        """Return for each directory of OUR machine who else needs its file system."""

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:
        """Return who else needs the file system of the scratch directory. Raises MonitorError, Refused."""


class LocalHost(LocalRunHost):
    """See `Host`: this machine."""

    def __init__(self, access: LibvirtAccess, timeouts: Timeouts) -> None:
        self._access = access
        self._timeouts = timeouts

    def connection(self) -> Connection:
        """Connect to libvirt here."""
        access = self._access
        return Connection.open(access.uri, access.domain, self._timeouts.command_seconds + LOCK_SECONDS)

    def guard(self, lock: int) -> AbstractContextManager[GuardClient]:
        """Start a child process."""
        access, timeouts = self._access, self._timeouts
        hands = Hands(access.uri, access.domain, module_directory(), timeouts.command_seconds)
        return GuardClient.launch((hands.argument(), ""), self.thaw_if_frozen, timeouts.agent_seconds, lock)

    def thaw_if_frozen(self) -> bool:
        """Talk to the agent through libvirt."""
        access = self._access
        return agent.thaw_if_frozen(access.uri, access.domain, self._timeouts.agent_seconds)

    def leave(self, clients: Iterable[socket]) -> None:
        """Have them leave."""
        handshake.leave(clients, surely=True)

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:
        """Look which disks are on a directory's file system."""
        return tuple(Filling(each, _disks_on(each, disks)) for each in directories)

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:
        """Look which disks are on the scratch directory's file system."""
        return self.filling((directory,), disks)[0]


def _disks_on(directory: Path, disks: Sequence[Disk]) -> str:
    ours = FileSystem.of(directory)
    names = [one.name for one in disks if _is_on(one.filename, ours)]
    return f"{', '.join(names)} is on it too" if names else ""


def _is_on(filename: str, ours: FileSystem) -> bool:
    try:
        return (
            filename.startswith("/")
            and Path(filename).is_file()
            and FileSystem.of(filename).shared_with(ours)
        )
    except (OSError, ValueError):
        return False
