# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a domain of a libvirt on another host: its own protocol, relayed by our program there."""

from collections.abc import Iterator
from contextlib import contextmanager

from backupctl.cancel import Cancellation
from backupctl.errors import Refused
from backupctl.finding import Finding
from backupctl.options import LibvirtAccess, RunOptions, Timeouts, VmConfig
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.driver import LibvirtDriver, refuse_off
from backupctl.vm.remote import libvirt_host
from backupctl.vm.remote.libvirt_host import RemoteLibvirtHost


@contextmanager
def connect(
    vm: VmConfig, access: LibvirtAccess, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator["RemoteLibvirtDriver"]:
    """Connect to a domain on another host for as long as the block lasts.

    Raises MonitorUnreachable, Interrupted.
    """
    with libvirt_host.connected(access, timeouts, cancel) as there, there.connection() as connection:
        refuse_off(connection, access)
        yield RemoteLibvirtDriver(vm, access, timeouts, connection, there)


class RemoteLibvirtDriver(LibvirtDriver):
    """See `vm.driver.Driver`."""

    def __init__(
        self,
        vm: VmConfig,
        access: LibvirtAccess,
        timeouts: Timeouts,
        connection: Connection,
        there: RemoteLibvirtHost,
    ) -> None:
        super().__init__(vm, access, timeouts, connection, there)
        self._there = there

    def findings(self, options: RunOptions) -> Iterator[Finding]:
        """Tell of the host first: whatever else is told of the domain was told through it."""
        yield Finding(
            "ssh",
            "ok",
            f"{self._there.name}: connected; its host key is known, and python3 with libvirt's module runs "
            "there",
        )
        yield from super().findings(options)
        try:
            self._there.files.check_directory(options.scratch.directory)
        except Refused as err:
            yield Finding("scratch", "bad", f"on {self._there.name}: {err.message}", "scratch, --scratch")
