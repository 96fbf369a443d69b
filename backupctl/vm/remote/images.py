# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a VM on another host that is off: see `vm.offline.image_host.ImageHost`.

Our program there opens them and starts the daemon (`vm.remote.image_server`). Its monitor and its NBD server
are reached through the sockets that ssh forwards. What is said of a file here (its path, its descriptor) is
for messages, and for the daemon there: nothing of it is opened on this machine.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from backupctl.cancel import Cancellation
from backupctl.errors import BackupctlError, Locked
from backupctl.images.open_image import OpenImage
from backupctl.options import NoMonitor, QmpAccess, Timeouts, VmConfig, VmImage
from backupctl.system import qemu_tools
from backupctl.system.address import Address
from backupctl.vm.filling import Filling
from backupctl.vm.offline.images import DiskImages, OpenFile
from backupctl.vm.qmp import reply
from backupctl.vm.qmp.files import Files
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.nbd_export import Serve
from backupctl.vm.remote import host, libvirt_host
from backupctl.vm.remote.connected_host import MOST_DESCRIPTOR, ConnectedHost

_READS_IMAGES = {"images": True}
"""Of the options of the program there."""
_MOST_PATH = 4096
_ASK_SECONDS = 30.0
_START_SECONDS, _FILE_SECONDS = 45.0, 0.5
"""More than the program there waits for a daemon, see `nbd_server.await_ready`."""
_END_SECONDS = qemu_tools.END_SECONDS + 10.0


class ImagesHost(ConnectedHost):
    """The host of a plain VM that is off."""

    def __init__(self, vm: VmConfig, timeouts: Timeouts) -> None:
        address = host_of(vm)
        assert address is not None, "the images are there"
        super().__init__(address, timeouts)
        self._vm = vm

    def options(self, lock_seconds: float) -> dict[str, object]:
        """Tell what the VM is known by, for its lock."""
        access = self._vm.access
        if isinstance(access, QmpAccess):
            known = host.options_for(access, self._timeouts, session=True, lock_seconds=lock_seconds)
        else:
            known = {
                "session": True,
                "image": str(self._vm.images[0].files[0].path),
                "agent_seconds": self._timeouts.agent_seconds,
                "lock_seconds": lock_seconds,
            }
        return {**known, **_READS_IMAGES}


class OffDomainHost(libvirt_host.RemoteLibvirtHost):
    """The host of a domain that is off."""

    def options(self, lock_seconds: float) -> dict[str, object]:
        """Tell of libvirt and the domain."""
        return {**super().options(lock_seconds), **_READS_IMAGES}


class RemoteImages:
    """See `ImageHost`. there: the host, connected. images: the VM's, with their paths there."""

    def __init__(self, there: ConnectedHost, images: Sequence[VmImage]) -> None:
        self._there = there
        self._images = tuple(images)
        self._disks: tuple[DiskImages, ...] = ()

    @property
    def name(self) -> str:
        """As people know it."""
        return self._there.name

    @property
    def disks(self) -> tuple[DiskImages, ...]:
        """As the program there has opened them."""
        return self._disks

    @property
    def files(self) -> Files:
        """Those of the host."""
        return self._there.files

    @property
    def serve(self) -> Serve:
        """Have the daemon serve there, and relay its connections."""
        return self._there.serve

    @property
    def ended(self) -> bool:
        """Whether the line is cut. The end of a daemon there ends the connection to its monitor."""
        return not self._there.alive

    def start(self) -> None:
        """Have the program there start it. If the line was cut, connect anew, and open the images again."""
        if not self._disks or self.ended:
            self._there.open_again()
            self._disks = self._opened()
        files = sum(len(one.files) for one in self._disks)
        self._there.ask_images("start", seconds=_START_SECONDS + files * _FILE_SECONDS)

    def connect(self, seconds: float, cancel: Cancellation | None) -> Monitor:
        """Connect through the program there."""
        address = Address(path="/daemon", host=self._there.name)
        return Monitor.connect(address, seconds, cancel, self._there.line("image_monitor"))

    def reason(self) -> str:
        """Ask the program there."""
        try:
            return str(self._there.ask_images("reason", seconds=_ASK_SECONDS))[:500]
        except BackupctlError as err:
            return err.message

    def end(self) -> None:
        """Have it ended there; where that is not possible, the end of the line does it."""
        with suppress(BackupctlError):
            self._there.ask_images("end", seconds=_END_SECONDS)

    def kill(self) -> None:
        """The same, at once."""
        if self._there.alive:
            with suppress(BackupctlError):
                self._there.ask_images("kill", seconds=_ASK_SECONDS)

    def states(self) -> list[tuple[int, int]]:
        """Ask the program there."""
        found = self._there.ask_images("states", seconds=_ASK_SECONDS)
        with reply.understood("what its host tells of the images"):
            return [(reply.number(size), reply.number(changed)) for size, changed in found]

    def refuse_unwritable(self) -> None:
        """Have the program there try."""
        self._there.ask_images("refuse_unwritable", seconds=_ASK_SECONDS)

    def claim(self) -> None:
        """Have the program there lock them."""
        try:
            self._there.ask_images("claim", seconds=_ASK_SECONDS)
        except Locked as err:
            raise err.reworded(f"on {self.name}: {err.message}") from err

    def scratch_filling(self, directory: Path) -> Filling:
        """Nothing is written there."""
        return _Unused(directory)

    def _opened(self) -> tuple[DiskImages, ...]:
        wanted = [
            {"disk": one.disk, "files": [[str(file.path), file.format] for file in one.files]}
            for one in self._images
        ]
        told = self._there.ask_images("open", wanted, seconds=_ASK_SECONDS)
        with reply.understood("what its host tells of the images"):
            return tuple(
                DiskImages(one.disk, number, _files(one, files))
                for number, (one, files) in enumerate(zip(self._images, told, strict=True))
            )


class _Unused(Filling):
    """A directory of another host that nothing is written to."""

    def check(self, error: type[BackupctlError] = BackupctlError) -> None:
        """Nothing fills it."""

    def who(self) -> str:
        """Name nobody."""
        return ""


def host_of(vm: VmConfig) -> Address | None:
    """Return the address of the host that a plain VM's monitor or images are on, None for this machine."""
    if isinstance(vm.access, QmpAccess):
        return vm.access.qmp if vm.access.qmp.remote else None
    if isinstance(vm.access, NoMonitor):
        return vm.images[0].host
    return None


def _files(image: VmImage, told: list[Any]) -> tuple[OpenFile, ...]:
    return tuple(
        OpenFile(
            OpenImage(
                Path(reply.text(one["path"], _MOST_PATH)), reply.number(one["descriptor"], MOST_DESCRIPTOR)
            ),
            file.format,
            reply.flag(one["device"]),
        )
        for file, one in zip(image.files, told, strict=True)
    )
