# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver for a VM that is off: the same protocol, by a storage daemon of ours on its images."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, CommandFailed, Refused
from backupctl.finding import Finding
from backupctl.names import BitmapName, NodeName, VmName
from backupctl.options import RunOptions, ScratchOptions, Timeouts, ViewKind, VmConfig
from backupctl.system import bounded_read
from backupctl.vm import definition
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.definition import Definition, DefinitionFile
from backupctl.vm.disk import Disk, Inventory
from backupctl.vm.driver import Foreseen, PointFacts, ScratchBudget, Session
from backupctl.vm.filling import Filling
from backupctl.vm.local_scratch import LocalScratch
from backupctl.vm.offline import images as vm_images
from backupctl.vm.offline import recovery
from backupctl.vm.offline.daemon import Daemon
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
        closing(Daemon.start(disks, timeouts.command_seconds, cancel)) as daemon,
    ):
        yield OfflineDriver(vm.name, daemon, why_off)


class OfflineDriver(LocalScratch):
    """See `vm.driver.Driver`."""

    def __init__(self, name: VmName, daemon: Daemon, why_off: str) -> None:
        super().__init__(name)
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
        for one in self._daemon.disks:
            if one.format == "qcow2":
                _refuse_unwritable(one)

    def inventory(self) -> Inventory:
        """List the disks whose images are named."""
        return of_images(self._daemon)

    def definition(self) -> Definition:
        """Name the images and their formats: nothing else is known of a VM that is off."""
        images = [
            {"disk": one.disk, "path": str(one.path), "format": one.format} for one in self._daemon.disks
        ]
        content = json.dumps({"format": 1, "images": images}, indent=2) + "\n"
        known = DefinitionFile("images", "images.json", "", content.encode())
        return Definition((known,))

    def included(self, paths: Sequence[Path]) -> Definition:
        """Read them here."""
        return definition.included(paths, bounded_read.read)

    def state_files(self, *, firmware: bool) -> Definition:  # noqa: ARG002 - as above
        """Return none: UEFI variables are an image like others."""
        return Definition()

    def bitmaps(self) -> tuple[Bitmap, ...]:
        """Return the bitmaps of every image."""
        tops = {one.node for one in self._daemon.disks}
        found = inventory.all_bitmaps(self._daemon.monitor)
        return tuple(replace(one, read_only=False) if one.node in tops else one for one in found)

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

    def scratch_filling(self, directory: Path, disks: Sequence[Disk]) -> Filling:
        """Name other VMs only: nothing of this one is written there."""
        return self.filling((directory,), disks)[0]

    def foresee(self, facts: PointFacts) -> Foreseen:
        """See `recovery.foresee`."""
        return recovery.foresee(self._daemon, facts)

    def resolve(self, facts: PointFacts) -> list[str]:
        """See `recovery.resolve`."""
        return recovery.resolve(self._daemon, facts)

    @contextmanager
    def begin(self, lock: int) -> Iterator[Session]:  # noqa: ARG002 - no guard needs it
        """Begin a session."""
        session = OfflineSession(self._name, self._daemon)
        try:
            yield session
        finally:
            session.close()

    def findings(self, options: RunOptions) -> Iterator[Finding]:  # noqa: ARG002 - as above
        """Tell that the VM is off, and what reads its images."""
        yield Finding(
            "monitor",
            "ok",
            f"{self._why_off}; qemu-storage-daemon {self._daemon.monitor.version} reads its images",
        )
        for one in self._daemon.disks:
            yield Finding("image", "ok", f"{one.disk}: {one.path} ({one.format}), no other process uses it")


def _refuse_unwritable(one: vm_images.DiskImages) -> None:
    try:
        os.close(os.open(one.files[0].image.name, os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        raise Refused(
            f"cannot write to {one.path}: {err.strerror}; the image stores which parts of it change",
            state=UNTOUCHED,
        ) from err
