# SPDX-License-Identifier: GPL-2.0-or-later
"""The NBD export of a point-in-time view, and the sockets on which it is read.

The listening socket is made here, in a private directory, and handed to QEMU by descriptor: QEMU needs no
rights on any directory. Where descriptors can't be passed, QEMU makes the socket there. Its name is gone as
soon as our clients are connected.

Every client socket is shared with the guard before anything is said on it: QEMU must drop an export
before its client goes away, or (Debian's 7.2, disk on an iothread) it aborts.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from backupctl.errors import Failed
from backupctl.names import BitmapName, Namespace, NodeKind, NodeName
from backupctl.system import private_dir
from backupctl.vm.driver import Export
from backupctl.vm.qmp.monitor import Monitor

Serve = Callable[[Monitor, Namespace, int], AbstractContextManager[Callable[[], socket.socket]]]
"""Starts QEMU's NBD server for so many clients; in the block a client is connected by a call."""


@dataclass(frozen=True)
class ExportSpec:
    """What is to be exported of one disk.

    node: the view's node. active: the disk's own node, on which its bitmaps lie. bitmap: None for a full.
    """

    node: NodeName
    active: NodeName
    bitmap: BitmapName | None


class SocketHolder(Protocol):
    """Who holds duplicates of our clients' sockets, and outlives us: the guard."""

    def hold(self, connection: socket.socket, export: str) -> None:
        """Hold a duplicate of a socket, before anything is said on it. Raises GuardLost."""


def start_exports(
    monitor: Monitor,
    guard: SocketHolder,
    namespace: Namespace,
    specs: Sequence[ExportSpec],
    connections: int = 2,
    serve: Serve | None = None,
) -> tuple[Export, ...]:
    """Start QEMU's NBD server and export each view with its disk's bitmap, read-only.

    connections: sockets for each export. serve: starts the server where QEMU is, here by default.
    Raises MonitorError, GuardLost, Failed; the clients that were connected are closed then.
    """
    names = [namespace.node(NodeKind.EXPORT, number) for number in range(len(specs))]
    with (serve or served)(monitor, namespace, len(specs) * connections) as connect, ExitStack() as failed:
        for name, one in zip(names, specs, strict=True):
            monitor.execute("block-export-add", _arguments(monitor, name, one))
        # Only now: a client that has not shaken hands yet makes `nbd-server-stop` hang QEMU's main loop,
        # guest and all (7.2.22; docs/protocol.md, "Unexpected behaviour of QEMU"). From here on nothing
        # stands between connect and handshake.
        groups = [
            tuple(_connected(guard, name, connect, failed) for _ in range(connections)) for name in names
        ]
        failed.pop_all()
    return tuple(
        Export(name, one.bitmap, group) for name, one, group in zip(names, specs, groups, strict=True)
    )


def drain(exports: Sequence[Export]) -> None:
    """Throw away what has arrived for clients that read no more. Never raises or waits."""
    for sock in (sock for one in exports for sock in one.sockets):
        with suppress(OSError):  # nothing more for now, or the server has closed it
            while sock.recv(1 << 20, socket.MSG_DONTWAIT):
                pass


def descriptor_name(namespace: Namespace) -> str:
    """Name the listening socket's descriptor, between `getfd` and `nbd-server-start`."""
    return namespace.node(NodeKind.SERVER, 0)


@contextmanager
def served(monitor: Monitor, namespace: Namespace, clients: int) -> Iterator[Callable[[], socket.socket]]:
    """Start the NBD server on this machine; yields what connects to it. Raises MonitorError, Failed."""
    with _served(monitor, namespace, clients) as path:
        yield lambda: _connect(path)


@contextmanager
def _served(monitor: Monitor, namespace: Namespace, clients: int) -> Iterator[str]:
    """Start the NBD server for so many clients; yields the path to connect to, gone after the block."""
    with private_dir.directory() as directory:
        path = str(directory / "nbd.sock")  # short: a unix socket's path has 107 bytes
        if monitor.passes_descriptors:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(path)
                listener.listen(clients)
                start_server(monitor, namespace, clients, descriptor=listener.fileno())
                yield path
        else:
            start_server(monitor, namespace, clients, path=path)
            yield path


def start_server(
    monitor: Monitor, namespace: Namespace, clients: int, *, descriptor: int = -1, path: str = ""
) -> None:
    """Start the server on a listening socket that is passed, or that QEMU makes. Raises MonitorError."""
    if path:
        _start(monitor, {"type": "unix", "data": {"path": path}}, clients)
        return
    monitor.send_fd(descriptor)
    monitor.execute("getfd", {"fdname": descriptor_name(namespace)})
    _start(monitor, {"type": "fd", "data": {"str": descriptor_name(namespace)}}, clients)


def _start(monitor: Monitor, address: dict[str, object], clients: int) -> None:
    # Unless told, QEMU takes a hundred at most, and lets the others wait (conformance script
    # `of_more_clients_than_allowed_the_last_one_waits`).
    monitor.execute("nbd-server-start", {"addr": address, "max-connections": clients})


def _arguments(monitor: Monitor, name: str, one: ExportSpec) -> dict[str, object]:
    arguments: dict[str, object] = {"type": "nbd", "id": name, "node-name": one.node, "name": name}
    if one.bitmap is not None:
        # Before 7.1 QEMU takes a plain name only, and looks for it along the backing chain.
        exact = {"node": one.active, "name": one.bitmap}
        arguments["bitmaps"] = [exact if monitor.version.at_least(7, 1) else one.bitmap]
    return arguments


def _connect(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.connect(path)
    except BaseException:
        made.close()
        raise
    return made


def _connected(
    guard: SocketHolder, name: str, connect: Callable[[], socket.socket], failed: ExitStack
) -> socket.socket:
    """Connect a client. failed: closes it if one after it cannot connect."""
    try:
        made = failed.enter_context(connect())
    except OSError as err:
        raise Failed(f"cannot connect to QEMU's NBD server: {err.strerror}") from err
    guard.hold(made, name)
    return made
