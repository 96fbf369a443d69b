# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a VM that is reached by ssh: see `vm.qmp.host.Host`.

QEMU gets descriptors there as it does here, since our program there sends them along with what it relays. So
scratch files have no names, and QEMU needs no rights on any directory, unless it takes no descriptors.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import AgentUnavailable, MonitorError
from backupctl.names import Namespace
from backupctl.options import QmpAccess, Timeouts
from backupctl.system.address import Address
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp import nbd_export, reply
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.nbd_export import Serve
from backupctl.vm.remote import channel
from backupctl.vm.remote.channel import Channel
from backupctl.vm.remote.files import RemoteFiles
from backupctl.vm.remote.guard import RemoteGuard
from backupctl.vm.remote.names import GUARD_SECONDS, MONITOR, NBD, SILENCE_SECONDS

_MOST_DESCRIPTOR = 1 << 30
_AGENT_WAITS = 5
"""Of the agent's time-out: to connect, to synchronise, for a status, the thaw, and the status again."""


class RemoteHost:
    """See `Host`; `connected` makes one."""

    def __init__(self, access: QmpAccess, timeouts: Timeouts) -> None:
        self._access = access
        self._timeouts = timeouts
        self._held = ExitStack()
        self._channel: Channel | None = None
        self._clients: dict[int, int] = {}

    def open(self, lock_seconds: float, cancel: Cancellation | None = None) -> None:
        """Connect to the host. lock_seconds: how long to wait while another run works on the VM.

        Raises MonitorUnreachable, Interrupted.
        """
        options = options_for(self._access, self._timeouts, session=True, lock_seconds=lock_seconds)
        self._channel = self._held.enter_context(channel.opened(self._access.qmp, options, cancel))

    def close(self) -> None:
        """Leave the host. The guard there goes on if it has to."""
        self._held.close()

    def monitor(self, cancel: Cancellation | None = None) -> Monitor:
        """Connect to the monitor. Raises MonitorUnreachable, Interrupted."""
        return Monitor.connect(self._access.qmp, self._timeouts.command_seconds, cancel, _Line(self._there))

    def monitor_again(self) -> Monitor:
        """Connect to the host anew, and wait until the guard there has done what a broken line asks of it."""
        if not self._there.alive:
            self._held.close()
            self._clients.clear()
            self.open(SILENCE_SECONDS + GUARD_SECONDS)
        return self.monitor()

    @property
    def files(self) -> RemoteFiles:
        """Those of the host."""
        return RemoteFiles(self._there)

    @property
    def serve(self) -> Serve:
        """Start the NBD server on the host, and relay its connections."""
        return self._serve

    def guard(self, lock: int) -> AbstractContextManager[GuardClient]:  # noqa: ARG002 - it has a lock there
        """Return the guard that was started there with the connection."""
        return RemoteGuard(self._there, self._clients, self._timeouts.agent_seconds)

    def thaw_if_frozen(self) -> bool:
        """Have the program there talk to the agent."""
        return thaw_if_frozen(self._access, self._timeouts)

    def scratch_filling(self, directory: Path, monitor: Monitor, disks: Sequence[Disk]) -> Filling:  # noqa: ARG002
        """Return who else needs the file system of a directory there."""
        self.files.check_directory(directory)
        return self.files.filling(directory, monitor.remote_process)

    @property
    def _there(self) -> Channel:
        assert self._channel is not None, "open comes first"
        return self._channel

    @contextmanager
    def _serve(
        self, monitor: Monitor, namespace: Namespace, clients: int
    ) -> Iterator[Callable[[], socket.socket]]:
        answer = self._there.ask("listen", by_descriptor=monitor.passes_descriptors, clients=clients)
        with reply.understood("answer of its host"):
            path = reply.text(answer["path"])
            descriptor = -1 if path else reply.number(answer["descriptor"], _MOST_DESCRIPTOR)
        nbd_export.start_server(monitor, namespace, clients, descriptor=descriptor, path=path)
        yield self._connect

    def _connect(self) -> socket.socket:
        there = self._there
        made = Address(path=str(there.directory / NBD)).connect(self._timeouts.command_seconds)
        try:
            made.settimeout(None)
            with reply.understood("answer of its host"):
                self._clients[made.fileno()] = reply.number(there.ask("connect"), _MOST_DESCRIPTOR)
        except BaseException:
            made.close()
            raise
        return made


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


@contextmanager
def connected(
    access: QmpAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator[RemoteHost]:
    """Connect to a VM's host while the block lasts. Raises MonitorUnreachable, Interrupted."""
    host = RemoteHost(access, timeouts)
    try:
        host.open(min(2 * timeouts.command_seconds, GUARD_SECONDS), cancel)
        yield host
    finally:
        host.close()


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
    found = _agent_asked(access, timeouts, "freeze_status")
    return "frozen" if found == "frozen" else "thawed"


def thaw_if_frozen(access: QmpAccess, timeouts: Timeouts) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError."""
    return _agent_asked(access, timeouts, "thaw") is True


def _agent_asked(access: QmpAccess, timeouts: Timeouts, request: str) -> object:
    """Ask over a connection of its own: the guest must not wait for whoever has the monitor."""
    options = options_for(access, timeouts, session=False)
    try:
        with channel.opened(access.qmp, options) as there:
            return there.ask(request, _AGENT_WAITS * timeouts.agent_seconds + 5.0)
    except (MonitorError, OSError) as err:
        raise AgentUnavailable(f"no guest agent at {access.agent}: {err}") from err
