# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks of a VM are on the file system of a directory that a run fills, as far as QEMU tells."""

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from backupctl.names import NodeName, is_ours
from backupctl.system import open_files
from backupctl.system.open_files import FileSystem
from backupctl.vm.disk import Disk
from backupctl.vm.filling import Filling
from backupctl.vm.qmp import inventory
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import flag, understood


def filling(
    directory: Path,
    monitor: Monitor,
    disks: Iterable[Disk],
) -> Filling:
    """Look which disks of a VM are on a directory's file system. Raises MonitorError."""
    ours = FileSystem.of(directory)
    # Somebody else may have made the socket, or be in between.
    process = monitor.process if monitor.process and open_files.is_qemu(monitor.process) else None
    if names := ", ".join(disk.name for disk in disks if _is_there(disk.filename, ours)):
        return Filling(directory, f"{names} is on it too", process)
    if process is not None and open_files.written(process) is not None:
        return Filling(directory, "", process)
    nodes = inventory.named_nodes(monitor)
    with understood("description of its block nodes"):
        return Filling(directory, _named(nodes, ours), process)


def _named(nodes: Mapping[NodeName, Mapping[str, Any]], ours: FileSystem) -> str:
    """Say which file that the nodes name takes its space there, or which name tells us nothing."""
    doubt = ""
    for name, node in nodes.items():
        if node["drv"] != "file" or flag(node.get("ro", False)) or is_ours(name):
            continue
        filename = str(node["image"]["filename"])[:4096]
        there = _is_there(filename, ours)
        if there:
            return f"{filename:.300} of the VM is on it too"
        if there is None:
            doubt = f"{filename:.300} of the VM may be on it; its path cannot be looked up from here"
    return doubt


def _is_there(filename: str, ours: FileSystem) -> bool | None:
    """Whether a file takes its space there; None if it cannot be seen by the name that QEMU has for it."""
    if not filename.startswith("/") or filename.startswith("/dev/fdset/"):
        return None
    try:
        return stat.S_ISREG(Path(filename).stat().st_mode) and FileSystem.of(filename).shared_with(ours)
    except (OSError, ValueError):
        return None
