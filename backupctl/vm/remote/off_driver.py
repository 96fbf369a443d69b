# SPDX-License-Identifier: GPL-2.0-or-later
"""The drivers for a VM on another host that is off: those of this machine, with images that are there."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from backupctl.cancel import Cancellation
from backupctl.options import LibvirtAccess, Timeouts, VmConfig
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.offline.driver import OfflineDriver
from backupctl.vm.remote import connected_host
from backupctl.vm.remote.images import ImagesHost, OffDomainHost, RemoteImages


@contextmanager
def connect(
    vm: VmConfig, why_off: str, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator[OfflineDriver]:
    """Connect to the host, and open the images there. As `offline.driver.connect`, which raises the same."""
    with (
        connected_host.connected(ImagesHost(vm, timeouts), timeouts, cancel) as there,
        closing(Daemon.start(RemoteImages(there, vm.images), timeouts.command_seconds, cancel)) as daemon,
    ):
        yield OfflineDriver(vm.name, daemon, why_off)


@contextmanager
def connect_domain(
    vm: VmConfig,
    access: LibvirtAccess,
    why_off: str,
    timeouts: Timeouts,
    cancel: Cancellation | None = None,
) -> Iterator[OfflineDriver]:
    """Connect to libvirt there, and open the domain's images. As `libvirt.off_driver.connect`."""
    from backupctl.vm.libvirt import off_images  # noqa: PLC0415 - only a domain needs them
    from backupctl.vm.libvirt.off_driver import OffDriver  # noqa: PLC0415 - as above
    from backupctl.vm.libvirt.off_session import Off  # noqa: PLC0415 - as above

    with (
        connected_host.connected(OffDomainHost(access, timeouts), timeouts, cancel) as there,
        there.connection() as connection,
    ):
        disks = off_images.find(connection, vm)
        images = RemoteImages(there, disks.images)
        with closing(Daemon.start(images, timeouts.command_seconds, cancel)) as daemon:
            yield OffDriver(vm, why_off, Off(there.connection, connection, disks, daemon))
