# SPDX-License-Identifier: GPL-2.0-or-later
"""On the remote host: the images of a VM there that is off, and the storage daemon on them.

The images are opened and checked here as on the run's own machine (`vm.offline.images`), with the rights of
the user that ssh logs in. The daemon is ended in good order when the line is cut or the run ends: it stores
the bitmaps of images that are open for writing then. The kernel ends it if this program is killed.

Only a run that reads such images has this module sent along (`bundle.IMAGES`).
"""

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from backupctl.names import DiskName
from backupctl.options import ImageFile, VmImage
from backupctl.system.address import Address
from backupctl.vm.offline import claim, images
from backupctl.vm.offline.process import DaemonProcess

_CONNECT_SECONDS = 10.0


class ImageServer:
    """The images of one VM; `do_open` comes first. A run may ask for what begins with ``do_``."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._disks: tuple[images.DiskImages, ...] = ()
        self._process: DaemonProcess | None = None
        self._socket = Path()

    def do_open(self, wanted: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Open the images; tell of each file of each disk what a run needs to know.

        Raises Refused for a file that must not be used, MonitorUnreachable for one that cannot be.
        """
        self.close()
        self._disks = self._opened.enter_context(images.opened([_image(one) for one in wanted]))
        self._process = DaemonProcess(self._disks)
        return [[_told(file) for file in one.files] for one in self._disks]

    def do_start(self) -> None:
        """Start a daemon. Raises Locked, MonitorUnreachable, Failed."""
        assert self._process is not None, "open comes first"
        self._process.kill()
        self._socket = self._process.start()

    def do_reason(self) -> str:
        """Return the daemon's last error message."""
        return self._process.reason() if self._process is not None else ""

    def do_end(self) -> None:
        """End the daemon in good order."""
        if self._process is not None:
            self._process.end()

    def do_kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()

    def do_states(self) -> list[tuple[int, int]]:
        """See `images.states`."""
        return images.states(self._disks)

    def do_refuse_unwritable(self) -> None:
        """See `images.refuse_unwritable`. Raises Refused."""
        images.refuse_unwritable(self._disks)

    def do_claim(self) -> None:
        """See `claim.claim`. Raises Locked, MonitorUnreachable."""
        claim.claim(self._disks)

    def connect(self) -> socket.socket:
        """Connect to the daemon's monitor. Raises OSError."""
        return Address(path=str(self._socket)).connect(_CONNECT_SECONDS)

    def close(self) -> None:
        """End the daemon in good order, and close the images. Never raises."""
        self.do_end()
        self._opened.close()
        self._process, self._disks = None, ()


def _image(said: dict[str, Any]) -> VmImage:
    files = tuple(ImageFile(Path(path), kind) for path, kind in said["files"])
    return VmImage(DiskName(said["disk"]), files)


def _told(file: images.OpenFile) -> dict[str, Any]:
    return {"path": str(file.image.path), "descriptor": file.image.descriptor, "device": file.device}
