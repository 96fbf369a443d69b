# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a domain that is reached by ssh: see `vm.libvirt.host.Host`.

libvirt's own protocol passes through a socket that ssh forwards, and on to libvirt's, to which our program
there connects. The guard is there too, and has its own connection to libvirt.
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import AgentUnavailable, BackupctlError, MonitorError, MonitorUnreachable
from backupctl.names import Namespace, VmName
from backupctl.options import LibvirtAccess, Timeouts
from backupctl.system import libvirt_uri
from backupctl.system.address import Address
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.libvirt.connection import Connection, domain_names
from backupctl.vm.libvirt.host import LOCK_SECONDS
from backupctl.vm.libvirt.run_directory import QemuUser
from backupctl.vm.qmp import reply
from backupctl.vm.remote import channel
from backupctl.vm.remote.channel import Channel
from backupctl.vm.remote.files import RemoteFiles
from backupctl.vm.remote.guard import RemoteGuard
from backupctl.vm.remote.names import GUARD_SECONDS, MONITOR, NBD, SILENCE_SECONDS

_MOST_DESCRIPTOR = 1 << 30
_AGENT_WAITS = 5
"""Of the agent's time-out: to connect twice, for a status, the thaw, and the status again."""


class RemoteLibvirtHost:
    """See `Host`; `connected` makes one."""

    def __init__(self, access: LibvirtAccess, timeouts: Timeouts) -> None:
        self._access = access
        self._timeouts = timeouts
        self._held = ExitStack()
        self._channel: Channel | None = None
        self._clients: dict[int, int] = {}

    @property
    def name(self) -> str:
        """The host, as people know it."""
        return self._there.host

    def open(self, lock_seconds: float, cancel: Cancellation | None = None) -> None:
        """Connect to the host. lock_seconds: how long to wait while another run works on the domain.

        Raises MonitorUnreachable, Interrupted.
        """
        options = _options(self._access, self._timeouts, lock_seconds=lock_seconds)
        there = channel.opened(libvirt_uri.remote(self._access.uri).address, options, cancel)
        self._channel = self._held.enter_context(there)

    def close(self) -> None:
        """Leave the host. The guard there goes on if it has to."""
        self._held.close()

    def connection(self) -> Connection:
        """Connect to libvirt there; if the line was cut, wait until the guard has done what is due."""
        if not self._there.alive:
            self._held.close()
            self._clients.clear()
            self.open(SILENCE_SECONDS + GUARD_SECONDS)
        seconds = self._timeouts.command_seconds + LOCK_SECONDS
        made = Connection.open(_local(self._there), self._access.domain, seconds, _dial(self._there))
        made.header = self.files.header
        return made

    @property
    def files(self) -> RemoteFiles:
        """Those of the host."""
        return RemoteFiles(self._there)

    def guard(self, lock: int) -> AbstractContextManager[GuardClient]:  # noqa: ARG002 - it has a lock there
        """Return the guard that was started there with the connection."""
        return RemoteGuard(self._there, self._clients, self._timeouts.agent_seconds)

    def thaw_if_frozen(self) -> bool:
        """Have the program there talk to the agent."""
        return thaw_if_frozen(self._access, self._timeouts)

    def leave(self, clients: Iterable[socket.socket]) -> None:
        """Have QEMU's side of these connections leave: what we close here does not end it."""
        numbers = [self._clients[one.fileno()] for one in clients if one.fileno() in self._clients]
        if numbers:
            with suppress(BackupctlError, OSError):
                self._there.ask("leave", descriptors=numbers)

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:  # noqa: ARG002
        """No disk of the domain is on a file system of this machine."""
        return tuple(Filling(directory) for directory in directories)

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:  # noqa: ARG002 - as above
        """Return who else needs the file system of a directory there."""
        self.files.check_directory(directory)
        return self.files.filling(directory, None)

    def check_run_directory(self, directory: Path, prefix: str, qemu_user: QemuUser | None) -> None:
        """Have the program there look."""
        self.files.check_run_directory(directory, prefix, qemu_user)

    def make_run_directory(
        self, namespace: Namespace, vm: VmName, directory: Path, qemu_user: QemuUser | None
    ) -> Path:
        """Have the program there make it."""
        return self.files.make_run_directory(namespace, vm, directory, qemu_user)

    def give(self, descriptor: int, qemu_user: QemuUser | None) -> None:
        """Have the program there change the owner."""
        self.files.give(descriptor, qemu_user)

    def connect_nbd(self, path: Path, qemu_user: QemuUser | None) -> socket.socket:
        """Connect to the socket that ssh forwards, and have the program there go on to QEMU."""
        made = Address(path=str(self._there.directory / NBD)).connect(self._timeouts.command_seconds)
        try:
            made.settimeout(None)
            with reply.understood("answer of its host"):
                number = self._there.ask("connect_nbd", path=str(path), qemu_user=qemu_user)
                self._clients[made.fileno()] = reply.number(number, _MOST_DESCRIPTOR)
        except BaseException:
            made.close()
            raise
        return made

    @property
    def _there(self) -> Channel:
        assert self._channel is not None, "open comes first"
        return self._channel


@contextmanager
def connected(
    access: LibvirtAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator[RemoteLibvirtHost]:
    """Connect to a domain's host while the block lasts. Raises MonitorUnreachable, Interrupted."""
    host = RemoteLibvirtHost(access, timeouts)
    try:
        host.open(min(2 * timeouts.command_seconds, GUARD_SECONDS), cancel)
        yield host
    finally:
        host.close()


def domains(where: str, timeouts: Timeouts) -> list[tuple[str, bool]]:
    """Return the domains of another host's libvirt, and whether each runs. Raises MonitorError."""
    access = LibvirtAccess(where, "")
    options = _options(access, timeouts, guard=False)
    with channel.opened(libvirt_uri.remote(where).address, options) as there:
        return domain_names(_local(there), timeouts.command_seconds, _dial(there))


def freeze_status(access: LibvirtAccess, timeouts: Timeouts) -> str:
    """Return "thawed" or "frozen", as the agent remembers it. Raises AgentError."""
    return "frozen" if _agent_asked(access, timeouts, "freeze_status") == "frozen" else "thawed"


def thaw_if_frozen(access: LibvirtAccess, timeouts: Timeouts) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError."""
    return _agent_asked(access, timeouts, "thaw") is True


def _agent_asked(access: LibvirtAccess, timeouts: Timeouts, request: str) -> object:
    options = _options(access, timeouts, session=False)
    try:
        with channel.opened(libvirt_uri.remote(access.uri).address, options) as there:
            return there.ask(request, _AGENT_WAITS * timeouts.agent_seconds + 5.0)
    except (MonitorError, OSError) as err:
        raise AgentUnavailable(f"no guest agent of {access.domain}: {err}") from err


def _options(
    access: LibvirtAccess,
    timeouts: Timeouts,
    *,
    session: bool = True,
    guard: bool = True,
    lock_seconds: float = 0.0,
) -> dict[str, object]:
    said = {
        "socket": libvirt_uri.remote(access.uri).socket,
        "domain": access.domain,
        "seconds": timeouts.command_seconds,
    }
    return {
        "session": session,
        "guard": guard,
        "libvirt": said,
        "agent_seconds": timeouts.agent_seconds,
        "lock_seconds": lock_seconds,
    }


def _local(there: Channel) -> str:
    """Return the URI of the socket here that leads to libvirt there."""
    return f"qemu+unix:///system?socket={there.directory / MONITOR}"


def _dial(there: Channel) -> Callable[[], object]:
    def dial() -> None:
        try:
            there.ask("monitor")
        except OSError as err:
            raise MonitorUnreachable(
                f"no libvirt answers on {there.host}: {err.strerror}",
                hint="is libvirtd (or virtqemud) running there?",
            ) from err

    return dial
