# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a VM that is reached by ssh: see `vm.qmp.host.Host`.

QEMU gets descriptors there as it does here, since our program there sends them along with what it relays. So
scratch files have no names, and QEMU needs no rights on any directory, unless it takes no descriptors.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.options import QmpAccess, Timeouts
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.remote import connected_host
from backupctl.vm.remote.connected_host import ConnectedHost


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
        return Monitor.connect(self._access.qmp, self._timeouts.command_seconds, cancel, self.line("monitor"))

    def monitor_again(self) -> Monitor:
        """Connect to the monitor anew, and to the host where that is necessary."""
        self.open_again()
        return self.monitor()

    def thaw_if_frozen(self) -> bool:
        """Have the program there talk to the agent."""
        return thaw_if_frozen(self._access, self._timeouts)

    def scratch_filling(self, directory: Path, monitor: Monitor, disks: Sequence[Disk]) -> Filling:  # noqa: ARG002
        """Return who else needs the file system of a directory there."""
        self.files.check_directory(directory)
        return self.files.filling(directory, monitor.remote_process)


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
