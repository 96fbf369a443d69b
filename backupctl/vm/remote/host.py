# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a VM that is reached by ssh: see `vm.qmp.host.Host`.

QEMU gets descriptors there as it does here, since our program there sends them along with what it relays. So
scratch files have no names, and QEMU needs no rights on any directory, unless it takes no descriptors.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import MonitorError
from backupctl.names import Namespace
from backupctl.options import QmpAccess, Timeouts
from backupctl.system.address import Address
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.qmp import nbd_export, reply
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.nbd_export import Serve
from backupctl.vm.remote import connected_host
from backupctl.vm.remote.channel import Channel
from backupctl.vm.remote.connected_host import MOST_DESCRIPTOR, ConnectedHost
from backupctl.vm.remote.names import MONITOR


class RemoteHost(ConnectedHost):
    """See `Host`; `connected` makes one."""

    def __init__(self, access: QmpAccess, timeouts: Timeouts) -> None:
        super().__init__(access.qmp, timeouts)
        self._access = access

    def options(self, lock_seconds: float) -> dict[str, object]:
        """Tell of monitor and agent."""
        return options_for(self._access, self._timeouts, session=True, lock_seconds=lock_seconds)

    def monitor(self, cancel: Cancellation | None = None) -> Monitor:
        """Connect to the monitor. Raises MonitorUnreachable, Interrupted."""
        return Monitor.connect(self._access.qmp, self._timeouts.command_seconds, cancel, _Line(self._there))

    def monitor_again(self) -> Monitor:
        """Connect to the monitor anew, and to the host where that is necessary."""
        self.open_again()
        return self.monitor()

    @property
    def serve(self) -> Serve:
        """Start the NBD server on the host, and relay its connections."""
        return self._serve

    def thaw_if_frozen(self) -> bool:
        """Have the program there talk to the agent."""
        return thaw_if_frozen(self._access, self._timeouts)

    def scratch_filling(self, directory: Path, monitor: Monitor, disks: Sequence[Disk]) -> Filling:  # noqa: ARG002
        """Return who else needs the file system of a directory there."""
        self.files.check_directory(directory)
        return self.files.filling(directory, monitor.remote_process)

    @contextmanager
    def _serve(
        self, monitor: Monitor, namespace: Namespace, clients: int
    ) -> Iterator[Callable[[], socket.socket]]:
        answer = self._there.ask("listen", by_descriptor=monitor.passes_descriptors, clients=clients)
        with reply.understood("answer of its host"):
            path = reply.text(answer["path"])
            descriptor = -1 if path else reply.number(answer["descriptor"], MOST_DESCRIPTOR)
        nbd_export.start_server(monitor, namespace, clients, descriptor=descriptor, path=path)
        yield lambda: self.connect_client("connect")


class _Line:
    """See `vm.qmp.monitor.Line`."""

    def __init__(self, there: Channel) -> None:
        self._there = there

    def connect(self, seconds: float) -> tuple[socket.socket, int | None]:
        """Connect to the socket that ssh forwards, and have the program there go on to the monitor."""
        try:
            made = Address(path=str(self._there.directory / MONITOR)).connect(seconds)
        except OSError as err:  # of ours, so it says nothing of whether QEMU listens
            raise ConnectionError(0, f"the socket that ssh forwards: {err.strerror}") from err
        try:
            process = self._there.ask("monitor", seconds)
        except MonitorError as err:
            made.close()
            raise ConnectionError(0, err.message) from err
        except BaseException:
            made.close()
            raise
        return made, process if isinstance(process, int) else None

    def send_descriptor(self, descriptor: int) -> None:
        """Have the program there send it."""
        self._there.ask("send_fd", descriptor=descriptor)


def connected(
    access: QmpAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> AbstractContextManager[RemoteHost]:
    """Connect to a VM's host while the block lasts. Raises MonitorUnreachable, Interrupted."""
    return connected_host.connected(RemoteHost(access, timeouts), timeouts, cancel)


def options_for(
    access: QmpAccess, timeouts: Timeouts, *, session: bool, lock_seconds: float = 0.0
) -> dict[str, object]:
    """Return what the program there is told. session: whether it relays and has a guard."""
    return {
        "session": session,
        "monitor": access.qmp.path,
        "agent": access.agent.path if access.agent else "",
        "agent_seconds": timeouts.agent_seconds,
        "lock_seconds": lock_seconds,
    }


def freeze_status(access: QmpAccess, timeouts: Timeouts) -> str:
    """Return "thawed" or "frozen", as the agent remembers it. Raises AgentError."""
    options = options_for(access, timeouts, session=False)
    return connected_host.freeze_status(access.qmp, options, timeouts.agent_seconds, f"at {access.agent}")


def thaw_if_frozen(access: QmpAccess, timeouts: Timeouts) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError."""
    options = options_for(access, timeouts, session=False)
    return connected_host.thaw_if_frozen(access.qmp, options, timeouts.agent_seconds, f"at {access.agent}")
