# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems that we fill, and that disks of virtual machines lie on as well.

Were one full, the guests' own writes would fail: an image grows as its guest writes to new places. So
whatever writes much ends while `LOW_BYTES` are left, if a virtual machine may need them. Whose images are
there is asked of the processes on this machine, and only then; of the VM that is backed up its nodes tell as
well. What can't be told counts as there.
"""

import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from backupctl.cancel import Cancellation
from backupctl.errors import Failed, WriteFailed
from backupctl.names import PREFIX, NodeName
from backupctl.system import open_files
from backupctl.system.files import free_bytes
from backupctl.system.open_files import Place
from backupctl.vm.disk import Disk
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import flag, understood
from backupctl.vm.qmp.scratch import LOW_BYTES

_AGAIN_SECONDS = 2.0


class Filling:
    """The file system of a folder that we fill.

    told: what of the VM at hand lies on it, in words, "" if nothing is known to. process: that VM's QEMU,
    None if it can't be told.
    """

    def __init__(self, folder: Path, told: str = "", process: int | None = None) -> None:
        self.folder = folder
        self._told = told
        self._process = process
        self._asked = -_AGAIN_SECONDS

    @classmethod
    def of_run(
        cls,
        folder: Path,
        monitor: Monitor,
        disks: Iterable[Disk],
        nodes: Mapping[NodeName, Mapping[str, Any]],
    ) -> "Filling":
        """Look which disks of a VM lie on a folder's file system. nodes: of `disks.named_nodes`.

        Raises MonitorError.
        """
        place = Place.of(folder)
        # Somebody else may have made the socket, or stand between.
        process = monitor.process if monitor.process and open_files.is_qemu(monitor.process) else None
        if names := ", ".join(disk.name for disk in disks if _lies(disk.filename, place)):
            return cls(folder, f"{names} lies on it too", process)
        if process is not None and open_files.written(process) is not None:
            return cls(folder, "", process)
        with understood("description of its block nodes"):
            return cls(folder, _named(nodes, place), process)

    def check(self, error: type[Failed] = Failed) -> None:
        """Raise `error` if room is becoming scarce that a virtual machine may need.

        A folder that can't be looked at is left to whoever writes there.
        """
        with suppress(OSError):
            left = free_bytes(self.folder)
            if left >= LOW_BYTES or time.monotonic() - self._asked < _AGAIN_SECONDS:
                return
            if who := self.who():
                raise error(
                    f"the file system of {self.folder} is filling up ({left >> 20} MiB left), and {who}: "
                    "gave up before the guest's own writes could fail"
                )
            self._asked = time.monotonic()

    def who(self) -> str:
        """Say what of virtual machines lies, or may lie, on this file system; "" for nothing.

        Raises OSError.
        """
        if self._told:
            return self._told
        place, doubt = Place.of(self.folder), ""
        for process in sorted({*open_files.emulators(), *([self._process] if self._process else [])}):
            files = open_files.written(process)
            if files is None:
                doubt = (
                    f"a disk of another VM may lie on it (the files of process {process} can't be looked at)"
                )
            for file in files or ():
                if file.place.shared_with(place):
                    return f"{file.path:.300} of the VM of process {process} lies on it too"
        return doubt


def watching(stop: Cancellation, target: Path) -> Cancellation:
    """Return a Stop that looks at the file system of a file that is being written, too.

    A device or a pipe fills none.
    """
    if target.exists() and not target.is_file():
        return stop
    filling = Filling(next(folder for folder in target.absolute().parents if folder.is_dir()))
    return stop.also(lambda: filling.check(WriteFailed))


def _named(nodes: Mapping[NodeName, Mapping[str, Any]], place: Place) -> str:
    """Say which file that the nodes name takes its room there, or which name tells us nothing."""
    doubt = ""
    for name, node in nodes.items():
        if node["drv"] != "file" or flag(node.get("ro", False)) or name.startswith(PREFIX):
            continue
        filename = str(node["image"]["filename"])[:4096]
        lies = _lies(filename, place)
        if lies:
            return f"{filename:.300} of the VM lies on it too"
        if lies is None:
            doubt = f"{filename:.300} of the VM may lie on it, which can't be told from here"
    return doubt


def _lies(filename: str, place: Place) -> bool | None:
    """Whether a file takes its room there; None if it can't be seen by the name that QEMU has for it."""
    if not filename.startswith("/") or filename.startswith("/dev/fdset/"):
        return None
    try:
        return stat.S_ISREG(Path(filename).stat().st_mode) and Place.of(filename).shared_with(place)
    except (OSError, ValueError):
        return None
