# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems that we fill, and that disks of virtual machines lie on as well.

Were one full, the guests' own writes would fail: an image grows as its guest writes to new places. So
whatever writes much ends while `LOW_BYTES` are left, if a virtual machine may need them. Whose images are
there is asked of the processes on this machine, and only then; of the VM that is backed up its nodes tell as
well. What is not known counts as there.
"""

import time
from contextlib import suppress
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import Failed, WriteFailed
from backupctl.system import open_files
from backupctl.system.files import free_bytes
from backupctl.system.open_files import FileSystem
from backupctl.vm.scratch_directory import LOW_BYTES

_AGAIN_SECONDS = 2.0


class Filling:
    """The file system of a directory that we fill.

    guests: what of the VM at hand lies on it, in words, "" if nothing is known to. process: that VM's QEMU,
    None if that is not known.
    """

    def __init__(self, directory: Path, guests: str = "", process: int | None = None) -> None:
        self.directory = directory
        self._guests = guests
        self._process = process
        self._asked = -_AGAIN_SECONDS

    def check(self, error: type[Failed] = Failed) -> None:
        """Raise `error` if room is becoming scarce that a virtual machine may need.

        A directory that can't be looked at is left to whoever writes there.
        """
        with suppress(OSError):
            left = self.free_bytes()
            if left >= LOW_BYTES or time.monotonic() - self._asked < _AGAIN_SECONDS:
                return
            if who := self.who():
                raise error(
                    f"the file system of {self.directory} is filling up ({left >> 20} MiB left), and {who}: "
                    "gave up before the guest's own writes could fail"
                )
            self._asked = time.monotonic()

    def free_bytes(self) -> int:
        """Return how much is left on it, in bytes. Raises OSError."""
        return free_bytes(self.directory)

    def who(self) -> str:
        """Say what of virtual machines lies, or may lie, on this file system; "" for nothing.

        Raises OSError.
        """
        if self._guests:
            return self._guests
        ours, doubt = FileSystem.of(self.directory), ""
        known = {self._process: "VM"} if self._process else {}
        for process, kind in sorted({**dict(open_files.writers()), **known}.items()):
            files = open_files.written(process)
            if files is None:
                doubt = f"a disk of another VM may be on it (cannot look at the files of process {process})"
            for file in files or ():
                if file.file_system.shared_with(ours):
                    return f"{file.path:.300} of the {kind} of process {process} is on it too"
        return doubt


def watching(cancel: Cancellation, target: Path) -> Cancellation:
    """Return a Cancellation that also looks at the file system of a file that is being written.

    A device or a pipe fills none.
    """
    if target.exists() and not target.is_file():
        return cancel
    filling = Filling(next(directory for directory in target.absolute().parents if directory.is_dir()))
    return cancel.also(lambda: filling.check(WriteFailed))
