# SPDX-License-Identifier: GPL-2.0-or-later
"""What a backup needs of the file system that QEMU's scratch files are on: of this machine, or of another.

`vm/remote/host.py` does the same on the host of a VM that is reached by ssh; a descriptor is then one of our
program there.
"""

import os
from pathlib import Path
from typing import Protocol

from backupctl.names import Namespace, VmName
from backupctl.system import bounded_read, files, open_files
from backupctl.vm import scratch_directory
from backupctl.vm.qmp import scratch_file


class Files(Protocol):
    """The file system that scratch files are on. On another host each call may raise MonitorError."""

    def check_directory(self, directory: Path) -> None:
        """Refuse a scratch directory that is missing or not writable. Raises Refused."""

    def free_bytes(self, directory: Path) -> int:
        """Return how much an ordinary user can still write there, in bytes. Raises OSError."""

    def make_private(self, namespace: Namespace, vm: VmName, directory: Path) -> Path:
        """Make a run's directory for named scratch files. Raises Refused."""

    def left_directories(self, namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
        """Name the private directories that dead runs left. Raises Failed."""

    def sweep(self, namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
        """Remove those directories; return what was done, in words. Raises Failed."""

    def make_scratch(
        self, directory: Path, path: Path | None, size: int, reserve_bytes: int
    ) -> scratch_file.Made:
        """Make a scratch file, see `scratch_file.make`. Raises Failed."""

    def used_bytes(self, descriptor: int) -> int:
        """Return how many bytes of a file hold data."""

    def empty(self, descriptor: int) -> None:
        """Free the space of a file. Raises OSError."""

    def close(self, descriptor: int) -> None:
        """Close a file. Raises OSError."""

    def read_plain(self, path: Path, most_bytes: int) -> bytes:
        """Return the content of a plain file. Raises Unusable."""

    def command_line(self, process: int) -> tuple[str, ...] | None:
        """Return a process's arguments; None if it is not a QEMU, or cannot be looked at."""


class LocalFiles:
    """See `Files`: those of this machine."""

    def check_directory(self, directory: Path) -> None:
        """Refuse a directory that we cannot write to."""
        scratch_directory.check(directory)

    def free_bytes(self, directory: Path) -> int:
        """Ask the file system."""
        return files.free_bytes(directory)

    def make_private(self, namespace: Namespace, vm: VmName, directory: Path) -> Path:
        """See `scratch_directory.make_private`."""
        return scratch_directory.make_private(namespace, vm, directory)

    def left_directories(self, namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
        """See `scratch_directory.left_directories`."""
        return scratch_directory.left_directories(namespace, vm, directory)

    def sweep(self, namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
        """See `scratch_directory.sweep`."""
        return scratch_directory.sweep(namespace, vm, directory)

    def make_scratch(
        self, directory: Path, path: Path | None, size: int, reserve_bytes: int
    ) -> scratch_file.Made:
        """See `scratch_file.make`."""
        return scratch_file.make(directory, path, size, reserve_bytes)

    def used_bytes(self, descriptor: int) -> int:
        """See `files.used_bytes`."""
        return files.used_bytes(descriptor)

    def empty(self, descriptor: int) -> None:
        """Truncate it."""
        os.ftruncate(descriptor, 0)

    def close(self, descriptor: int) -> None:
        """Close it."""
        os.close(descriptor)

    def read_plain(self, path: Path, most_bytes: int) -> bytes:
        """See `bounded_read.read`."""
        return bounded_read.read(path, most_bytes)

    def command_line(self, process: int) -> tuple[str, ...] | None:
        """See `open_files.command_line`."""
        return open_files.command_line(process) if open_files.is_qemu(process) else None


LOCAL = LocalFiles()
