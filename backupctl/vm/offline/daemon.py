# SPDX-License-Identifier: GPL-2.0-or-later
"""A storage daemon of ours that opens the images of a VM that is off, and its monitor.

It opens them read-only, so that a run that is killed leaves them as they are: QEMU marks every bitmap of an
image that is open for writing as in use, and one that is still marked when the image is opened again is lost.
Only while bitmaps change are the images open for writing (`writable`), some milliseconds twice in a run.
QEMU stores the bitmaps when that ends (`qcow2_reopen_bitmaps_ro` in block/qcow2-bitmap.c), not when the
daemon ends. The images stay locked all the time: from 6.1 on QEMU can change the mode of a node
(``blockdev-reopen``) without closing it.

Where the daemon runs is another's business (`vm.offline.image_host`). If this process ends, by whatever
cause, the daemon ends as well.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from backupctl.cancel import Cancellation
from backupctl.errors import (
    UNTOUCHED,
    CommandFailed,
    Locked,
    MonitorError,
    MonitorUnreachable,
    OutcomeUnknown,
    Refused,
)
from backupctl.images import open_image
from backupctl.names import NodeName
from backupctl.system import qemu_tools
from backupctl.vm.offline import images
from backupctl.vm.offline.image_host import ImageHost
from backupctl.vm.offline.images import DiskImages
from backupctl.vm.qmp import inventory
from backupctl.vm.qmp.monitor import Monitor

_PATIENCE_SECONDS = 3.0
"""For an image that is still locked: the daemon of a killed run is about to end, or the VM itself."""
_AGAIN_SECONDS = 0.2
_READERS = "another process reads the image, such as qemu-nbd: end it, or wait for its end, and try again"


class Daemon:
    """One storage daemon; `start` makes one. host: where it runs."""

    def __init__(self, host: ImageHost, timeout_seconds: float, cancel: Cancellation | None) -> None:
        self.host = host
        self._timeout = timeout_seconds
        self._cancel = cancel
        self._monitor: Monitor | None = None

    @classmethod
    def start(cls, host: ImageHost, timeout_seconds: float, cancel: Cancellation | None = None) -> Self:
        """Start it, and connect. To be called by the main thread.

        Raises MonitorUnreachable if an image is in use or cannot be opened, Refused, Failed, Interrupted.
        """
        self = cls(host, timeout_seconds, cancel)
        self._start_patiently()
        return self

    @property
    def monitor(self) -> Monitor:
        """The connection to it."""
        assert self._monitor is not None, "start comes first"
        return self._monitor

    @property
    def disks(self) -> tuple[DiskImages, ...]:
        """The disks whose images it has open."""
        return self.host.disks

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Open the images that store bitmaps for writing; when the block ends, their bitmaps are stored.

        Waits a little while somebody else reads them. Raises MonitorError. If the block raises, its error is
        the one that is raised.
        """
        self._open_for_writing()
        try:
            yield
        except BaseException:
            with suppress(MonitorError):
                self._reopen(read_only=True)
            raise
        self._reopen(read_only=True)

    def check(self) -> None:
        """Take in what the daemon said on its own. Raises OutcomeUnknown if it has ended."""
        if self.host.ended:
            raise OutcomeUnknown("(between commands)", f"qemu-storage-daemon has ended: {self.host.reason()}")
        self.monitor.pump()

    def restart(self) -> bool:
        """Start another daemon if this one ended or does not answer; whether it did. Raises as `start`."""
        if not self.host.ended and self.monitor.alive:
            return False
        self._kill()
        self._start_patiently()
        return True

    def close(self) -> None:
        """End it. Never raises; all that must last was stored by `writable`."""
        answers = self.monitor.alive
        self.monitor.close()
        if answers:
            self.host.end()
        else:
            self.host.kill()

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
        self.host.start()
        self._monitor = self.host.connect(self._timeout, self._cancel)
        self._refuse_other_files()

    def _refuse_other_files(self) -> None:
        """Raise Refused if QEMU opened a file that we did not: a header was changed after it was checked."""
        ours = {NodeName(node["node-name"]) for disk in self.disks for node in disk.nodes()}
        if other := sorted(set(inventory.named_nodes(self.monitor)) - ours):
            raise Refused(f"an image was changed while it was opened, and names another file ({other[0]})")
        if "blockdev-reopen" not in self.monitor.commands:
            where = f"on {self.host.name}: " if self.host.name else ""
            raise Refused(
                f"{where}qemu-storage-daemon {self.monitor.version} is too old: 6.1 is needed",
                state=UNTOUCHED,
            )

    def _open_for_writing(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self._reopen(read_only=False)
            except CommandFailed as err:
                in_use = qemu_tools.in_use(err.description)
                if not in_use or time.monotonic() > deadline:
                    raise self._unwritable(err, in_use=in_use) from err
            time.sleep(_AGAIN_SECONDS)

    def _unwritable(self, err: CommandFailed, *, in_use: bool) -> CommandFailed:
        """Return the error for images that QEMU does not open for writing, naming them as a user does."""
        where = f"on {self.host.name}: " if self.host.name else ""
        why = open_image.named(err.description, images.all_files(self.disks))
        if in_use:
            return err.reworded(f"{where}an image is in use by another process: {why}").add(hint=_READERS)
        try:
            self.host.refuse_unwritable()
        except Refused as refused:
            return err.reworded(refused.message).add(hint=refused.hint)
        return err.reworded(f"{where}QEMU cannot write to an image: {why}")

    def _reopen(self, *, read_only: bool) -> None:
        options = [node for one in self._storing() for node in one.reopened(read_only=read_only)]
        if options:
            self.monitor.execute("blockdev-reopen", {"options": options})

    def _storing(self) -> list[DiskImages]:
        return [one for one in self.disks if one.format == "qcow2"]

    def _in_use(self, err: Locked) -> MonitorUnreachable:
        paths = [disk.path for disk in self.disks if str(disk.path) in err.message]
        return images.in_use(paths[0] if paths else self.disks[0].path, self.host.name)

    def _kill(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        self.host.kill()
