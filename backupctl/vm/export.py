# SPDX-License-Identifier: GPL-2.0-or-later
"""The NBD export of a point-in-time view, and the sockets on which it is read.

The listening socket is made here and handed to QEMU by descriptor. Clients are connected before QEMU
even begins to serve, and the socket's name is gone by then: nobody else can connect, and QEMU needs no
rights on any folder. Where descriptors can't be passed, QEMU makes the socket in the run's private folder.

Every client socket is shared with the guard before anything is said on it: QEMU must drop an export
before its client goes away, or (Debian's 7.2, disk on an iothread) it aborts.
"""

import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import Failed
from backupctl.names import BitmapName, NodeName, Owner
from backupctl.vm.guard import Guard
from backupctl.vm.monitor import Monitor

SOCKET_NAME = "nbd.sock"


@dataclass(frozen=True)
class Shown:
    """What is to be exported of one disk.

    node: the view's node. active: the disk's own node, on which its bitmaps lie. bitmap: None for a full.
    """

    node: NodeName
    active: NodeName
    bitmap: BitmapName | None


@dataclass(frozen=True)
class Export:
    """One exported node with the connected sockets to read it.

    name: NBD's name of the export. bitmap: the dirty bitmap that the export shows, None for a full.
    """

    name: str
    bitmap: BitmapName | None
    sockets: tuple[socket.socket, ...]

    def close(self) -> None:
        """Close the sockets."""
        for sock in self.sockets:
            sock.close()


def publish(
    monitor: Monitor,
    guard: Guard,
    owner: Owner,
    shown: Sequence[Shown],
    private: Path | None,
    connections: int = 2,
) -> tuple[Export, ...]:
    """Start QEMU's NBD server and export each view with its disk's bitmap, read-only.

    private: the run's folder, None where QEMU takes descriptors. connections: sockets for each export.
    Raises MonitorError, GuardLost.
    """
    names = [owner.node("exp", number) for number in range(len(shown))]
    if private is None:
        with tempfile.TemporaryDirectory(prefix="backupctl-") as folder:
            path = str(Path(folder, SOCKET_NAME))
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(path)
                listener.listen(len(names) * connections + 1)
                groups = _connect(guard, names, path, connections)
                _start_by_descriptor(monitor, owner, listener)
    else:
        path = str(private / SOCKET_NAME)
        monitor.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        groups = _connect(guard, names, path, connections)
    exports = []
    for name, one, group in zip(names, shown, groups, strict=True):
        arguments: dict[str, object] = {"type": "nbd", "id": name, "node-name": one.node, "name": name}
        if one.bitmap is not None:
            # Before 7.1 QEMU takes a plain name only, and looks for it along the backing chain.
            exact = {"node": one.active, "name": one.bitmap}
            arguments["bitmaps"] = [exact if monitor.version.at_least(7, 1) else one.bitmap]
        monitor.execute("block-export-add", arguments)
        exports.append(Export(name, one.bitmap, group))
    return tuple(exports)


def descriptor_name(owner: Owner) -> str:
    """Name the listening socket's descriptor, between `getfd` and `nbd-server-start`."""
    return owner.node("nbd", 0)


def _start_by_descriptor(monitor: Monitor, owner: Owner, listener: socket.socket) -> None:
    name = descriptor_name(owner)
    monitor.send_fd(listener.fileno())
    monitor.execute("getfd", {"fdname": name})
    monitor.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": name}}})


def _connect(guard: Guard, names: Sequence[str], path: str, count: int) -> list[tuple[socket.socket, ...]]:
    groups = []
    for name in names:
        group = []
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
            except OSError as err:
                raise Failed(f"QEMU's NBD server can't be reached: {err.strerror}") from err
            guard.hold(sock, name)
            group.append(sock)
        groups.append(tuple(group))
    return groups
