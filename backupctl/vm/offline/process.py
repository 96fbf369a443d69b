# SPDX-License-Identifier: GPL-2.0-or-later
"""The process of a storage daemon on the images of a VM that is off, here or on another host.

On another host it is a child of our program there. The kernel ends it if its parent ends, by whatever
cause.
"""

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from backupctl.errors import UNTOUCHED, Failed, MonitorUnreachable, RepositoryError
from backupctl.images import nbd_server, open_image
from backupctl.system import private_dir, qemu_tools
from backupctl.vm.offline import images
from backupctl.vm.offline.images import DiskImages

_SOCKET, _READY = "qmp.sock", "ready"
_INSTALL = "it is part of QEMU: apt install qemu-system-common"


class DaemonProcess:
    """At most one daemon at a time. disks: their images, which are open for as long as this is used."""

    def __init__(self, disks: Sequence[DiskImages]) -> None:
        self._disks = tuple(disks)
        self._held = ExitStack()
        self._process: qemu_tools.Child | None = None
        self._complaints: IO[bytes] | None = None

    def start(self) -> Path:
        """Start it; return the path of its monitor's socket. To be called by the main thread.

        Raises Locked if an image is in use, MonitorUnreachable if one cannot be opened, Failed. Whatever it
        raises, `kill` comes next.
        """
        opened = images.all_files(self._disks)
        directory = self._held.enter_context(private_dir.directory())
        self._complaints = self._held.enter_context(_complaints())
        try:
            self._process = qemu_tools.start(
                _command(self._disks, directory),
                complaints=self._complaints,
                environment=nbd_server.ALLOCATOR,
                descriptors=open_image.descriptors(opened),
            )
        except Failed as err:
            raise err.add(state=UNTOUCHED, hint=_INSTALL) from err
        try:
            nbd_server.await_ready(self._process, directory / _READY, self._complaints, opened)
        except RepositoryError as err:
            raise MonitorUnreachable(err.message, state=UNTOUCHED) from err
        return directory / _SOCKET

    @property
    def ended(self) -> bool:
        """Whether there is none, or it has ended by itself."""
        return self._process is None or self._process.poll() is not None

    def reason(self) -> str:
        """Return its last error message."""
        if self._complaints is None:
            return "no error message"
        return open_image.named(qemu_tools.last_message(self._complaints), images.all_files(self._disks))

    def end(self) -> None:
        """End it in good order: it stores the bitmaps of what it has open for writing. Never raises."""
        if self._process is not None and not self.ended:
            qemu_tools.end(self._process)
        self.kill()

    def kill(self) -> None:
        """End it at once. Never raises."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._held.close()
        self._complaints = None


def _complaints() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as err:
        raise Failed(f"cannot create a temporary file: {err.strerror}") from err


def _command(disks: Sequence[DiskImages], directory: Path) -> list[str]:
    nodes = [word for one in disks for node in one.nodes() for word in ("--blockdev", json.dumps(node))]
    path = str(directory / _SOCKET).replace(",", ",,")  # QEMU's way to write a comma in a value
    return [
        qemu_tools.server_program(),
        *nodes,
        *("--chardev", f"socket,id=monitor,path={path},server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
        *("--pidfile", str(directory / _READY)),
    ]
