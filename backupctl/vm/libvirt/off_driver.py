# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a domain that is off: a storage daemon on its images, and libvirt's notes of checkpoints."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager

from backupctl.cancel import Cancellation
from backupctl.errors import CommandFailed
from backupctl.finding import Finding
from backupctl.names import BitmapName, NodeName
from backupctl.options import LibvirtAccess, RunOptions, Timeouts, VmConfig
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import Definition
from backupctl.vm.disk import Inventory
from backupctl.vm.driver import Foreseen, PointFacts, Session
from backupctl.vm.libvirt import checkpoints, definition, diagnosis, off_checkpoints, off_images, off_recovery
from backupctl.vm.libvirt.host import LocalHost
from backupctl.vm.libvirt.off_session import Off, OffSession
from backupctl.vm.offline import images as vm_images
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.offline.driver import OfflineDriver
from backupctl.vm.offline.image_host import LocalImageHost


@contextmanager
def connect(
    vm: VmConfig,
    access: LibvirtAccess,
    why_off: str,
    timeouts: Timeouts,
    cancel: Cancellation | None = None,
) -> Iterator["OffDriver"]:
    """Connect to libvirt, and open the domain's images, for as long as the block lasts.

    why_off: as for `offline.driver.connect`, which raises the same. If the domain is started meanwhile,
    either its QEMU has the images, and they cannot be opened, or we have them, and its start fails.
    """
    host = LocalHost(access, timeouts)
    with host.connection() as connection:
        disks = off_images.find(connection, vm)
        with (
            vm_images.opened(disks.images) as opened,
            closing(Daemon.start(LocalImageHost(opened), timeouts.command_seconds, cancel)) as daemon,
        ):
            yield OffDriver(vm, why_off, Off(host.connection, connection, disks, daemon))


class OffDriver(OfflineDriver):
    """See `vm.driver.Driver`."""

    def __init__(self, vm: VmConfig, why_off: str, off: Off) -> None:
        super().__init__(vm.name, off.daemon, why_off)
        self._off = off
        self._asked: dict[str, set[str]] = defaultdict(set)

    def preflight(self) -> None:
        """Refuse a libvirt whose checkpoints are of another kind, and an image that cannot be written to."""
        diagnosis.refuse_libvirt(self._off.connection)
        super().preflight()

    def inventory(self) -> Inventory:
        """List the domain's disks."""
        images = off_checkpoints.layers(self._off.daemon, self._off.disks)
        found = off_checkpoints.listed(self._off.connection, images)
        return off_recovery.inventory(self._off.daemon, self._off.disks, list(found))

    def definition(self) -> Definition:
        """Return the domain's XML."""
        return definition.definition(self._off.connection)

    def state_files(self, *, firmware: bool) -> Definition:
        """Read the UEFI variables and the TPM's state, as of a domain that runs."""
        return definition.state_files(self._off.connection, self._daemon.host.files, firmware=firmware)

    def bitmaps(self) -> tuple[Bitmap, ...]:
        """Return the domain's checkpoints, each once for each of its disks."""
        return tuple(bitmap for disk in self.inventory().disks for bitmap in disk.bitmaps)

    def remove_bitmap(self, node: NodeName, name: BitmapName) -> str:
        """Remove a checkpoint, which is one for all of its disks, when it was called for each of them."""
        off = self._off
        disk = next(one.disk for one in off.daemon.disks if one.node == node)
        wanted = checkpoints.checkpoint_of(name, disk)
        self._asked[wanted].add(off.disks.target(disk))
        images = off_checkpoints.layers(off.daemon, off.disks)
        there = {one.name: one for one in off_checkpoints.listed(off.connection, images)}
        if wanted not in there:
            return ""
        if others := sorted(there[wanted].sizes.keys() - self._asked[wanted]):
            return f"its checkpoint has bitmaps on {', '.join(others)} too, and goes only with all of them"
        if any(wanted in layer.bitmaps for each in images.values() for layer in each[1:]):
            return "it has a bitmap below the newest image, which libvirt removes while the domain runs"
        try:
            off_checkpoints.remove(off.daemon, images, [wanted])
            checkpoints.forget(off.connection, wanted)
        except CommandFailed as err:
            return err.description
        return ""

    def foresee(self, facts: PointFacts) -> Foreseen:
        """See `off_recovery.foresee`."""
        return off_recovery.foresee(self._off.connection, self._off.daemon, self._off.disks, facts)

    def resolve(self, facts: PointFacts) -> list[str]:
        """See `off_recovery.resolve`."""
        return off_recovery.resolve(self._off.connection, self._off.daemon, self._off.disks, facts)

    @contextmanager
    def begin(self, lock: int) -> Iterator[Session]:  # noqa: ARG002 - no guard needs it
        """Begin a session, and keep other backups off the images. Raises Locked, MonitorError."""
        self._off.daemon.host.claim()
        session = OffSession(self._name, self._off)
        try:
            yield session
        finally:
            session.close()

    def findings(self, options: RunOptions) -> Iterator[Finding]:
        """Tell that the domain is off, what reads its images, and whose checkpoints there are."""
        yield from super().findings(options)
        yield from diagnosis.of_libvirt(self._off.connection)
        yield from diagnosis.of_checkpoints(checkpoints.listed(self._off.connection, off=True))
