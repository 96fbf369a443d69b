# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine that the images of a VM that is off are on: this one, or one that ssh reaches.

The latter is in `vm.remote.images`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from backupctl.cancel import Cancellation
from backupctl.system.address import Address
from backupctl.vm.filling import Filling
from backupctl.vm.offline import claim, images
from backupctl.vm.offline.images import DiskImages
from backupctl.vm.offline.process import DaemonProcess
from backupctl.vm.qmp import nbd_export
from backupctl.vm.qmp.files import LOCAL, Files
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.nbd_export import Serve


class ImageHost(Protocol):
    """What a daemon's user does on the machine of the images."""

    @property
    def name(self) -> str:
        """The name of another host, "" for this one."""

    @property
    def disks(self) -> tuple[DiskImages, ...]:
        """The images that are open, known at the latest when a daemon has started."""

    @property
    def files(self) -> Files:
        """The file system there."""

    @property
    def serve(self) -> Serve:
        """What starts the daemon's NBD server, and connects to it."""

    @property
    def ended(self) -> bool:
        """Whether the daemon is known to have ended, or to be out of reach."""

    def start(self) -> None:
        """Start a daemon on the images.

        Raises Locked if one is in use, MonitorUnreachable, Refused, Failed; `kill` comes next then.
        """

    def connect(self, seconds: float, cancel: Cancellation | None) -> Monitor:
        """Connect to its monitor. Raises MonitorUnreachable, Interrupted."""

    def reason(self) -> str:
        """Return the last error message of the daemon. Never raises."""

    def end(self) -> None:
        """End the daemon in good order. Never raises."""

    def kill(self) -> None:
        """End it at once. Never raises."""

    def states(self) -> list[tuple[int, int]]:
        """Return `OpenFile.state` of each file. Raises MonitorError."""

    def refuse_unwritable(self) -> None:
        """Refuse an image that must store bitmaps and cannot be written to. Raises Refused, MonitorError."""

    def claim(self) -> None:
        """Keep other backups off the images, see `claim.claim`. Raises Locked, MonitorError."""

    def scratch_filling(self, directory: Path) -> Filling:
        """Return what else needs the file system of a scratch directory there. Raises MonitorError."""


class LocalImageHost:
    """See `ImageHost`: this machine. disks: whose images are open for as long as this is used."""

    name = ""

    def __init__(self, disks: Sequence[DiskImages]) -> None:
        self._disks = tuple(disks)
        self._process = DaemonProcess(self._disks)
        self._socket = Path()

    @property
    def disks(self) -> tuple[DiskImages, ...]:
        """As they were opened."""
        return self._disks

    @property
    def files(self) -> Files:
        """Those of this machine."""
        return LOCAL

    @property
    def serve(self) -> Serve:
        """See `nbd_export.served`."""
        return nbd_export.served

    @property
    def ended(self) -> bool:
        """Look at the process."""
        return self._process.ended

    def start(self) -> None:
        """Start a child process. To be called by the main thread."""
        self._socket = self._process.start()

    def connect(self, seconds: float, cancel: Cancellation | None) -> Monitor:
        """Connect to the socket that it made."""
        return Monitor.connect(Address(path=str(self._socket)), seconds, cancel)

    def reason(self) -> str:
        """Read what it wrote."""
        return self._process.reason()

    def end(self) -> None:
        """See `DaemonProcess.end`."""
        self._process.end()

    def kill(self) -> None:
        """See `DaemonProcess.kill`."""
        self._process.kill()

    def states(self) -> list[tuple[int, int]]:
        """Look at the open files."""
        return images.states(self._disks)

    def refuse_unwritable(self) -> None:
        """Try to open them."""
        images.refuse_unwritable(self._disks)

    def claim(self) -> None:
        """Lock the open files."""
        claim.claim(self._disks)

    def scratch_filling(self, directory: Path) -> Filling:
        """Name other VMs only: nothing of this one is written there."""
        return Filling(directory)
