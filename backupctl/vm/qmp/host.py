# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that QEMU runs on, as far as a backup has to do with it: this one, or one that ssh reaches."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from socket import socket
from typing import Protocol

from backupctl.options import QmpAccess, Timeouts
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.guest import agent, handshake
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp import nbd_export, shared_files
from backupctl.vm.qmp.files import LOCAL, Files
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.nbd_export import Serve


class Host(Protocol):
    """What a driver and its session do on QEMU's machine."""

    @property
    def files(self) -> Files:
        """The file system that scratch files are on."""

    @property
    def serve(self) -> Serve:
        """What starts QEMU's NBD server, and connects to it."""

    def monitor_again(self) -> Monitor:
        """Return a new connection to the monitor; the old one broke. Raises MonitorUnreachable."""

    def guard(self, lock: int) -> AbstractContextManager[GuardClient]:
        """Start a guard there, see `GuardClient.start`. Raises GuardLost, Refused."""

    def thaw_if_frozen(self) -> bool:
        """Thaw a guest that is frozen; whether it was. Raises AgentError."""

    def leave(self, clients: Iterable[socket]) -> None:
        """Have NBD clients leave whose exports are gone, and wait until QEMU knows. Never raises."""

    def scratch_filling(self, directory: Path, monitor: Monitor, disks: Sequence[Disk]) -> Filling:
        """Return who else needs the file system of the scratch directory. Raises MonitorError."""


class LocalHost:
    """See `Host`: this machine."""

    def __init__(self, access: QmpAccess, timeouts: Timeouts) -> None:
        self._access = access
        self._timeouts = timeouts

    @property
    def files(self) -> Files:
        """Those of this machine."""
        return LOCAL

    @property
    def serve(self) -> Serve:
        """See `nbd_export.served`."""
        return nbd_export.served

    def monitor_again(self) -> Monitor:
        """Connect once more."""
        return Monitor.connect(self._access.qmp, self._timeouts.command_seconds)

    def guard(self, lock: int) -> AbstractContextManager[GuardClient]:
        """Start a child process."""
        access = self._access
        return GuardClient.start(access.qmp, access.agent, self._timeouts.agent_seconds, lock)

    def thaw_if_frozen(self) -> bool:
        """Talk to the agent."""
        address = self._access.agent
        return address is not None and agent.thaw_if_frozen(address, self._timeouts.agent_seconds)

    def leave(self, clients: Iterable[socket]) -> None:
        """Have them leave."""
        handshake.leave(clients, surely=True)

    def scratch_filling(self, directory: Path, monitor: Monitor, disks: Sequence[Disk]) -> Filling:
        """See `shared_files`."""
        LOCAL.check_directory(directory)
        return shared_files.filling(directory, monitor, disks)
