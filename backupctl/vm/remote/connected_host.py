# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that ssh reaches, whether its VM is reached by QMP or through libvirt.

`vm.remote.host` and `vm.remote.libvirt_host` say what is different.
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from backupctl.cancel import Cancellation
from backupctl.errors import (
    AgentUnavailable,
    BackupctlError,
    Failed,
    MonitorError,
    MonitorUnreachable,
)
from backupctl.names import Namespace
from backupctl.options import Timeouts
from backupctl.system.address import Address
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.qmp import nbd_export, reply
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.nbd_export import Serve
from backupctl.vm.remote import channel
from backupctl.vm.remote.channel import Channel
from backupctl.vm.remote.files import RemoteFiles
from backupctl.vm.remote.guard import RemoteGuard
from backupctl.vm.remote.names import GUARD_SECONDS, MONITOR, NBD, SILENCE_SECONDS

MOST_DESCRIPTOR = 1 << 30
_AGENT_WAITS = 5
"""Of the agent's time-out: to connect in two steps, for a status, the thaw, and the status again."""


class ConnectedHost:
    """What both kinds of hosts do; `connected` opens one.

    address: of the host. timeouts: of the run.
    """

    def __init__(self, address: Address, timeouts: Timeouts) -> None:
        self._address = address
        self._timeouts = timeouts
        self._held = ExitStack()
        self._channel: Channel | None = None
        self._clients: dict[int, int] = {}

    def options(self, lock_seconds: float) -> dict[str, object]:
        """Return what the program there is told. lock_seconds: how long it waits for another run's end."""
        raise NotImplementedError

    def open(self, lock_seconds: float, cancel: Cancellation | None = None) -> None:
        """Connect to the host. lock_seconds: how long to wait while another run works on the VM.

        Raises MonitorUnreachable, Interrupted.
        """
        there = channel.opened(self._address, self.options(lock_seconds), cancel)
        self._channel = self._held.enter_context(there)

    def open_again(self) -> None:
        """If the line was cut, connect anew, and wait until the guard there has done what that asks of it."""
        if not self._there.alive:
            self._held.close()
            self._clients.clear()
            self.open(SILENCE_SECONDS + GUARD_SECONDS)

    def close(self) -> None:
        """Leave the host. The guard there goes on if it has to."""
        self._held.close()

    @property
    def files(self) -> RemoteFiles:
        """Those of the host."""
        return RemoteFiles(self._there)

    def guard(self, lock: int) -> AbstractContextManager[GuardClient]:  # noqa: ARG002 - it has a lock there
        """Return the guard that was started there with the connection."""
        return RemoteGuard(self._there, self._clients, self._timeouts.agent_seconds)

    def leave(self, clients: Iterable[socket.socket]) -> None:
        """Have QEMU's side of these connections leave: what we close here does not end it."""
        numbers = [self._clients[one.fileno()] for one in clients if one.fileno() in self._clients]
        if numbers:
            with suppress(BackupctlError, OSError):
                self._there.ask("leave", descriptors=numbers)

    def connect_client(self, request: str, **arguments: object) -> socket.socket:
        """Connect to the socket that ssh forwards, and have the program there go on to an NBD server.

        request: what the program is asked for. Raises Failed, MonitorError, OSError.
        """
        made = Address(path=str(self._there.directory / NBD)).connect(self._timeouts.command_seconds)
        try:
            made.settimeout(None)
            with reply.understood("answer of its host"):
                number = self._there.ask(request, **arguments)
                self._clients[made.fileno()] = reply.number(number, MOST_DESCRIPTOR)
        except BaseException:
            made.close()
            raise
        return made

    def line(self, request: str) -> "MonitorLine":
        """Return the way to a monitor there. request: what the program is asked for."""
        return MonitorLine(self._there, request)

    @property
    def serve(self) -> Serve:
        """Start the NBD server on the host, and relay its connections."""
        return self._serve

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

    @property
    def alive(self) -> bool:
        """Whether the host could be reached when it was last asked."""
        return self._there.alive

    @property
    def name(self) -> str:
        """The host, as people know it."""
        return self._there.host

    def ask_images(self, call: str, *arguments: object, seconds: float) -> Any:
        """Return what an `ImageServer` there answers within so many seconds.

        Raises what it raises, MonitorError.
        """
        try:
            return self._there.ask("images", seconds, call=call, arguments=list(arguments))
        except OSError as err:
            raise Failed(f"on {self.name}: {err.strerror}") from err
        except MonitorUnreachable as err:
            raise err.reworded(f"on {self.name}: {err.message}") from err
        except MonitorError:  # which names the host
            raise
        except Failed as err:
            raise err.reworded(f"on {self.name}: {err.message}") from err

    @property
    def _there(self) -> Channel:
        assert self._channel is not None, "open comes first"
        return self._channel


class MonitorLine:
    """See `vm.qmp.monitor.Line`. request: what the program there is asked for when a client has connected."""

    def __init__(self, there: Channel, request: str) -> None:
        self._there = there
        self._request = request

    def connect(self, seconds: float) -> tuple[socket.socket, int | None]:
        """Connect to the socket that ssh forwards, and have the program there go on to the monitor."""
        try:
            made = Address(path=str(self._there.directory / MONITOR)).connect(seconds)
        except OSError as err:  # of ours, so it says nothing of whether QEMU listens
            raise ConnectionError(0, f"the socket that ssh forwards: {err.strerror}") from err
        try:
            process = self._there.ask(self._request, seconds)
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


HostType = TypeVar("HostType", bound=ConnectedHost)


@contextmanager
def connected(host: HostType, timeouts: Timeouts, cancel: Cancellation | None = None) -> Iterator[HostType]:
    """Connect to a VM's host while the block lasts. Raises MonitorUnreachable, Interrupted."""
    try:
        host.open(min(2 * timeouts.command_seconds, GUARD_SECONDS), cancel)
        yield host
    finally:
        host.close()


def freeze_status(address: Address, options: Mapping[str, object], agent_seconds: float, whose: str) -> str:
    """Return "thawed" or "frozen", as the agent remembers it. whose: it is, in words. Raises AgentError."""
    found = _agent_asked(address, options, agent_seconds, "freeze_status", whose)
    return "frozen" if found == "frozen" else "thawed"


def thaw_if_frozen(address: Address, options: Mapping[str, object], agent_seconds: float, whose: str) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError."""
    return _agent_asked(address, options, agent_seconds, "thaw", whose) is True


def _agent_asked(
    address: Address, options: Mapping[str, object], agent_seconds: float, request: str, whose: str
) -> object:
    """Ask over a connection of its own: the guest must not wait for whoever has the monitor."""
    try:
        with channel.opened(address, dict(options)) as there:
            return there.ask(request, _AGENT_WAITS * agent_seconds + 5.0)
    except (MonitorError, OSError) as err:
        raise AgentUnavailable(f"no guest agent {whose}: {err}") from err
