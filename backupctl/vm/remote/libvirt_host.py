# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a domain that is reached by ssh: see `vm.libvirt.host.Host`.

libvirt's own protocol passes through a socket that ssh forwards, and on to libvirt's, to which our program
there connects. The guard is there too, and has its own connection to libvirt.
"""

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import MonitorUnreachable
from backupctl.names import Namespace, VmName
from backupctl.options import LibvirtAccess, Timeouts
from backupctl.system import libvirt_uri
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.libvirt.connection import Connection, domain_names
from backupctl.vm.libvirt.host import LOCK_SECONDS
from backupctl.vm.libvirt.run_directory import QemuUser
from backupctl.vm.remote import channel, connected_host
from backupctl.vm.remote.channel import Channel
from backupctl.vm.remote.connected_host import ConnectedHost
from backupctl.vm.remote.names import MONITOR


class RemoteLibvirtHost(ConnectedHost):
    """See `Host`; `connected` makes one."""

    def __init__(self, access: LibvirtAccess, timeouts: Timeouts) -> None:
        super().__init__(libvirt_uri.remote(access.uri).address, timeouts)
        self._access = access

    def options(self, lock_seconds: float) -> dict[str, object]:
        """Tell of libvirt and the domain."""
        return _options(self._access, self._timeouts, lock_seconds=lock_seconds)

    def connection(self) -> Connection:
        """Connect to libvirt there; if the line was cut, wait until the guard has done what is due."""
        self.open_again()
        seconds = self._timeouts.command_seconds + LOCK_SECONDS
        made = Connection.open(_local(self._there), self._access.domain, seconds, _dial(self._there))
        made.header = self.files.header
        return made

    def thaw_if_frozen(self) -> bool:
        """Have the program there talk to the agent."""
        return thaw_if_frozen(self._access, self._timeouts)

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
        return self.connect_client("connect_nbd", path=str(path), qemu_user=qemu_user)


def connected(
    access: LibvirtAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> AbstractContextManager[RemoteLibvirtHost]:
    """Connect to a domain's host while the block lasts. Raises MonitorUnreachable, Interrupted."""
    return connected_host.connected(RemoteLibvirtHost(access, timeouts), timeouts, cancel)


def domains(where: str, timeouts: Timeouts) -> list[tuple[str, bool]]:
    """Return the domains of another host's libvirt, and whether each runs. Raises MonitorError."""
    access = LibvirtAccess(where, "")
    options = _options(access, timeouts, guard=False)
    with channel.opened(libvirt_uri.remote(where).address, options) as there:
        return domain_names(_local(there), timeouts.command_seconds, _dial(there))


def freeze_status(access: LibvirtAccess, timeouts: Timeouts) -> str:
    """Return "thawed" or "frozen", as the agent remembers it. Raises AgentError."""
    address, options = libvirt_uri.remote(access.uri).address, _options(access, timeouts, session=False)
    return connected_host.freeze_status(address, options, timeouts.agent_seconds, f"of {access.domain}")


def thaw_if_frozen(access: LibvirtAccess, timeouts: Timeouts) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError."""
    address, options = libvirt_uri.remote(access.uri).address, _options(access, timeouts, session=False)
    return connected_host.thaw_if_frozen(address, options, timeouts.agent_seconds, f"of {access.domain}")


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
            hint = "is libvirtd (or virtqemud) running there?"
            if isinstance(err, PermissionError):
                hint = "ssh logs in a user who may not use libvirt; a member of the group libvirt may"
            raise MonitorUnreachable(
                f"no libvirt answers on {there.host}: {err.strerror}", hint=hint
            ) from err

    return dial
