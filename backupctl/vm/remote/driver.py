# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a QEMU on another host: plain QMP, relayed by our program there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import Refused
from backupctl.finding import Finding
from backupctl.options import QmpAccess, RunOptions, Timeouts, VmConfig
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.qmp.driver import QmpDriver
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.remote import host
from backupctl.vm.remote.host import RemoteHost


@contextmanager
def connect(
    vm: VmConfig, access: QmpAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator["RemoteDriver"]:
    """Connect to a VM on another host for as long as the block lasts.

    Raises MonitorUnreachable, Interrupted.
    """
    with host.connected(access, timeouts, cancel) as there, there.monitor(cancel) as monitor:
        yield RemoteDriver(vm, access, timeouts, monitor, there)


class RemoteDriver(QmpDriver):
    """See `vm.driver.Driver`."""

    def __init__(
        self, vm: VmConfig, access: QmpAccess, timeouts: Timeouts, monitor: Monitor, there: RemoteHost
    ) -> None:
        super().__init__(vm, access, timeouts, monitor, there)
        self._there = there

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:  # noqa: ARG002
        """No disk of the VM is on a file system of this machine."""
        return tuple(Filling(directory) for directory in directories)

    def findings(self, options: RunOptions) -> Iterator[Finding]:
        """Tell of the host first: whatever else is told of the VM was told through it."""
        yield Finding(
            "ssh", "ok", f"{self._access.qmp.host}: connected; its host key is known, and python3 runs there"
        )
        yield from super().findings(options)
        try:
            self._there.files.check_directory(options.scratch.directory)
        except Refused as err:
            yield Finding(
                "scratch", "bad", f"on {self._access.qmp.host}: {err.message}", "scratch, --scratch"
            )
