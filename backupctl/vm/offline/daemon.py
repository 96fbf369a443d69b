# SPDX-License-Identifier: GPL-2.0-or-later
"""A storage daemon of ours that opens the images of a VM that is off, and its monitor.

It opens them read-only, so that a run that is killed leaves them as they are: QEMU marks every bitmap of an
image that is open for writing as in use, and one that is still marked when the image is opened again is lost.
Only while bitmaps change are the images open for writing (`writable`), some milliseconds twice in a run.
QEMU stores the bitmaps when that ends (`qcow2_reopen_bitmaps_ro` in block/qcow2-bitmap.c), not when the
daemon ends. The images stay locked all the time: from 6.1 on QEMU can change the mode of a node
(``blockdev-reopen``) without closing it.

The kernel ends the daemon if this process ends, by whatever cause.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Self

from backupctl.cancel import Cancellation
from backupctl.errors import (
    UNTOUCHED,
    Failed,
    Locked,
    MonitorError,
    MonitorUnreachable,
    OutcomeUnknown,
    Refused,
    RepositoryError,
)
from backupctl.images import nbd_server, open_image
from backupctl.names import NodeName
from backupctl.system import private_dir, qemu_tools
from backupctl.system.address import Address
from backupctl.vm.offline import images
from backupctl.vm.offline.images import DiskImages
from backupctl.vm.qmp import inventory
from backupctl.vm.qmp.monitor import Monitor

_SOCKET, _READY = "qmp.sock", "ready"
_PATIENCE_SECONDS = 3.0
"""For an image that is still locked: the daemon of a killed run is about to end, or the VM itself."""
_AGAIN_SECONDS = 0.2


class Daemon:
    """One storage daemon; `start` makes one. monitor: the connection to it."""

    def __init__(
        self, disks: Sequence[DiskImages], timeout_seconds: float, cancel: Cancellation | None
    ) -> None:
        self.disks = tuple(disks)
        self._timeout = timeout_seconds
        self._cancel = cancel
        self._held = ExitStack()
        self._process: qemu_tools.Child | None = None
        self._complaints: IO[bytes] | None = None
        self.monitor: Monitor

    @classmethod
    def start(
        cls, disks: Sequence[DiskImages], timeout_seconds: float, cancel: Cancellation | None = None
    ) -> Self:
        """Start it, and connect. To be called by the main thread.

        Raises MonitorUnreachable if an image is in use or cannot be opened, Refused, Failed, Interrupted.
        """
        self = cls(disks, timeout_seconds, cancel)
        self._start_patiently()
        return self

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Open the images that store bitmaps for writing; when the block ends, their bitmaps are stored.

        Raises MonitorError. If the block raises, its error is the one that is raised.
        """
        self._reopen(read_only=False)
        try:
            yield
        except BaseException:
            with suppress(MonitorError):
                self._reopen(read_only=True)
            raise
        self._reopen(read_only=True)

    def check(self) -> None:
        """Take in what the daemon said on its own. Raises OutcomeUnknown if it has ended."""
        if self._ended:
            raise OutcomeUnknown("(between commands)", f"qemu-storage-daemon has ended: {self._reason()}")
        self.monitor.pump()

    def restart(self) -> bool:
        """Start another daemon if this one ended or does not answer; whether it did. Raises as `start`."""
        if not self._ended and self.monitor.alive:
            return False
        self._kill()
        self._start_patiently()
        return True

    def close(self) -> None:
        """End it. Never raises; all that must last was stored by `writable`."""
        if self._process is not None and not self._ended and self.monitor.alive:
            self.monitor.close()
            qemu_tools.end(self._process)
        self._kill()

    @property
    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _start_patiently(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self._start()
            except Locked as err:
                self._kill()
                if time.monotonic() > deadline:
                    raise self._in_use(err) from err
            except BaseException:
                self._kill()
                raise
            if self._cancel is not None:
                self._cancel.check()
            time.sleep(_AGAIN_SECONDS)

    def _start(self) -> None:
        opened = images.all_files(self.disks)
        directory = self._held.enter_context(private_dir.directory())
        self._complaints = self._held.enter_context(_complaints())
        self._process = qemu_tools.start(
            _command(self.disks, directory),
            complaints=self._complaints,
            environment=nbd_server.ALLOCATOR,
            descriptors=open_image.descriptors(opened),
        )
        try:
            nbd_server.await_ready(self._process, directory / _READY, self._complaints, opened)
        except RepositoryError as err:
            raise MonitorUnreachable(err.message, state=UNTOUCHED) from err
        self.monitor = Monitor.connect(Address(path=str(directory / _SOCKET)), self._timeout, self._cancel)
        self._held.callback(self.monitor.close)
        self._refuse_other_files()

    def _refuse_other_files(self) -> None:
        """Raise Refused if QEMU opened a file that we did not: a header was changed after it was checked."""
        ours = {NodeName(node["node-name"]) for disk in self.disks for node in disk.nodes()}
        if other := sorted(set(inventory.named_nodes(self.monitor)) - ours):
            raise Refused(f"an image was changed while it was opened, and names another file ({other[0]})")
        if "blockdev-reopen" not in self.monitor.commands:
            raise Refused(
                f"qemu-storage-daemon {self.monitor.version} is too old: 6.1 is needed",
                state=UNTOUCHED,
            )

    def _reopen(self, *, read_only: bool) -> None:
        options = [node for one in self._storing() for node in one.reopened(read_only=read_only)]
        if options:
            self.monitor.execute("blockdev-reopen", {"options": options})

    def _storing(self) -> list[DiskImages]:
        return [one for one in self.disks if one.format == "qcow2"]

    def _in_use(self, err: Locked) -> MonitorUnreachable:
        paths = [disk.path for disk in self.disks if str(disk.path) in err.message]
        return images.in_use(paths[0] if paths else self.disks[0].path)

    def _reason(self) -> str:
        if self._complaints is None:
            return "no error message"
        return open_image.named(qemu_tools.last_message(self._complaints), images.all_files(self.disks))

    def _kill(self) -> None:
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
