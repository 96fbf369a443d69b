# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a VM that is off: the same protocol, by a storage daemon of ours on its images."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import CommandFailed, Refused
from backupctl.finding import Finding
from backupctl.names import BitmapName, Namespace, NodeName, VmName
from backupctl.options import RunOptions, ScratchOptions, Timeouts, ViewKind, VmConfig
from backupctl.vm import definition
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import Definition, DefinitionFile
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.driver import Foreseen, PointFacts, ScratchBudget, Session
from backupctl.vm.filling import Filling
from backupctl.vm.offline import images as vm_images
from backupctl.vm.offline import recovery
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.offline.image_host import LocalImageHost
from backupctl.vm.offline.inventory import of_images
from backupctl.vm.offline.session import OfflineSession
from backupctl.vm.qmp import inventory

_NO_SCRATCH = ScratchBudget(size=0, ideal_bytes=0, abort_at=None, throttle_at=None)


@contextmanager
def connect(
    vm: VmConfig, why_off: str, timeouts: Timeouts, cancel: Cancellation | None = None
) -> Iterator["OfflineDriver"]:
    """Open the images, and a daemon on them, for as long as the block lasts.

    why_off: what tells that the VM is off, in words. Raises Refused for an image that must not be used,
    MonitorUnreachable for one that is in use or cannot be opened, Failed, Interrupted.
    """
    with (
        vm_images.opened(vm.images) as disks,
        closing(Daemon.start(LocalImageHost(disks), timeouts.command_seconds, cancel)) as daemon,
    ):
        yield OfflineDriver(vm.name, daemon, why_off)


class OfflineDriver:
    """See `vm.driver.Driver`."""

    def __init__(self, name: VmName, daemon: Daemon, why_off: str) -> None:
        self._name = name
        self._daemon = daemon
        self._why_off = why_off

    @property
    def version(self) -> str:
        """The version of qemu-storage-daemon, and that it was one."""
        return f"{self._daemon.monitor.version} (qemu-storage-daemon; the VM is off)"

    @property
    def has_guest(self) -> bool:
        """Nothing runs."""
        return False

    def preflight(self) -> None:
        """Refuse an image whose bitmaps could not be stored in the end."""
        self._daemon.host.refuse_unwritable()

    def inventory(self) -> Inventory:
        """List the disks whose images are named."""
        return of_images(self._daemon)

    def definition(self) -> Definition:
        """Name the images, their formats, and another host that they are on. Nothing else is known."""
        images = [
            {"disk": one.disk, "path": str(one.path), "format": one.format} for one in self._daemon.disks
        ]
        host = self._daemon.host.name
        told = {"format": 1, **({"host": host} if host else {}), "images": images}
        content = json.dumps(told, indent=2) + "\n"
        known = DefinitionFile("images", "images.json", "", content.encode())
        return Definition((known,))

    def included(self, paths: Sequence[Path]) -> Definition:
        """Read them on the machine of the images."""
        return definition.included(paths, self._daemon.host.files.read_plain)

    def state_files(self, *, firmware: bool) -> Definition:  # noqa: ARG002 - as above
        """Return none: UEFI variables are an image like others."""
        return Definition()

    def bitmaps(self) -> tuple[Bitmap, ...]:
        """Return the bitmaps of every image."""
        root_nodes = {one.node for one in self._daemon.disks}
        found = inventory.all_bitmaps(self._daemon.monitor)
        return tuple(replace(one, read_only=False) if one.node in root_nodes else one for one in found)

    def remove_bitmap(self, node: NodeName, name: BitmapName) -> str:
        """Remove one bitmap; return QEMU's refusal, or ""."""
        try:
            with self._daemon.writable():
                self._daemon.monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
        except CommandFailed as err:
            return err.description
        return ""

    def view_error(self, view: ViewKind, disks: Sequence[Disk]) -> str:  # noqa: ARG002 - the protocol's
        """Return "": the images themselves are the view, whichever is asked for."""
        return ""

    def check_scratch(self, directory: Path) -> None:
        """There are no scratch files."""

    def plan_scratch(
        self,
        disks: Sequence[Disk],
        options: ScratchOptions,  # noqa: ARG002 - as above
        guests: str = "",  # noqa: ARG002 - as above
    ) -> tuple[ScratchBudget, ...]:
        """Plan none."""
        return (_NO_SCRATCH,) * len(disks)

    def filling(self, directories: Sequence[Path], disks: Sequence[Disk]) -> tuple[Filling, ...]:  # noqa: ARG002 - as above
        """Name other VMs only: this one's guest writes nothing."""
        return tuple(Filling(one) for one in directories)

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:  # noqa: ARG002 - as above
        """Ask the machine of the images."""
        return self._daemon.host.scratch_filling(directory)

    def left_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.left_directories`."""
        return self._daemon.host.files.left_directories(namespace, self._name, directory)

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.sweep`."""
        return self._daemon.host.files.sweep(namespace, self._name, directory)

    def foresee(self, facts: PointFacts) -> Foreseen:
        """See `recovery.foresee`."""
        return recovery.foresee(self._daemon, facts)

    def resolve(self, facts: PointFacts) -> list[str]:
        """See `recovery.resolve`."""
        return recovery.resolve(self._daemon, facts)

    @contextmanager
    def begin(self, lock: int) -> Iterator[Session]:  # noqa: ARG002 - no guard needs it
        """Begin a session, and keep other backups off the images. Raises Locked, MonitorError."""
        self._daemon.host.claim()
        session = OfflineSession(self._name, self._daemon)
        try:
            yield session
        finally:
            session.close()

    def findings(self, options: RunOptions) -> Iterator[Finding]:  # noqa: ARG002 - as above
        """Tell that the VM is off, what reads its images, and whether it may write to them.

        Of another host first that it was reached.
        """
        if host := self._daemon.host.name:
            yield Finding("ssh", "ok", f"{host}: connected; its host key is known, and python3 runs there")
        yield Finding(
            "monitor",
            "ok",
            f"{self._why_off}; qemu-storage-daemon {self._daemon.monitor.version} reads its images",
        )
        for one in self._daemon.disks:
            yield Finding("image", "ok", f"{one.disk}: {one.path} ({one.format}), no other process uses it")
        try:
            self._daemon.host.refuse_unwritable()
        except Refused as err:
            yield Finding("image", "bad", err.message, err.hint)
