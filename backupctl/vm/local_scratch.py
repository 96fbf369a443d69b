# SPDX-License-Identifier: GPL-2.0-or-later
"""The scratch directory of a VM on this machine: the part of drivers and sessions that asks no VM."""

from pathlib import Path

from backupctl.names import Namespace, VmName
from backupctl.vm import scratch_directory


class LocalScratch:
    """What dead runs left of scratch files with names. name: of the VM, part of the directories' names."""

    def __init__(self, name: VmName) -> None:
        self._name = name

    def left_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.left_directories`."""
        return scratch_directory.left_directories(namespace, self._name, directory)

    def sweep_scratch(self, namespace: Namespace, directory: Path) -> list[str]:
        """See `scratch_directory.sweep`."""
        return scratch_directory.sweep(namespace, self._name, directory)
