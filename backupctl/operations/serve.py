# SPDX-License-Identifier: GPL-2.0-or-later
"""Serving a point's disks over NBD, read-only or with a writable overlay, until asked to stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, UsageError, WriteFailed
from backupctl.images import public_server, tls
from backupctl.images.open_image import OpenImage
from backupctl.images.public_server import ServedImage
from backupctl.names import DiskName
from backupctl.repository import chain, read_locks
from backupctl.repository.chain import Layer
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import listen, private_dir
from backupctl.targets import overlay
from backupctl.vm.filling import Filling

_CHECK_SECONDS = 0.1


@dataclass(frozen=True)
class Export:
    """One disk that is served. size: virtual, in bytes."""

    disk: DiskName
    uri: str
    size: int
    writable: bool


@dataclass(frozen=True)
class ServeRequest:
    """What is served, and where.

    disk: None for all. unix: the socket's path. tcp: ``[HOST:]PORT``, on this machine unless there is TLS.
    Neither: a socket in a private directory. tls: a directory with credentials, for TCP. writable_overlay:
    what is written goes into this qcow2 file (one disk only), which stays. The server ends before that takes
    the room of a VM whose disks are on the same file system.
    """

    point: Point
    disk: str | None = None
    unix: Path | None = None
    tcp: str | None = None
    tls: Path | None = None
    writable_overlay: Path | None = None


def serve(
    directory: VmDirectory,
    request: ServeRequest,
    *,
    ready: Callable[[tuple[Export, ...]], None],
    stop: Cancellation,
) -> None:
    """Serve one disk of a point, or all, until `stop` is requested; then return.

    ready: called once with what is served where. The repository is only read. Raises UsageError, NoSuchPoint,
    TargetExists, Locked, DamageFound, RepositoryError, WriteFailed.
    """
    with read_locks.reading(directory, request.point.id) as held:
        _serve(directory, replace(request, point=held), ready, stop)


def _serve(
    directory: VmDirectory,
    request: ServeRequest,
    ready: Callable[[tuple[Export, ...]], None],
    stop: Cancellation,
) -> None:
    point, writable_overlay = request.point, request.writable_overlay
    filling = None if writable_overlay is None else Filling(writable_overlay.absolute().parent)
    entries = _entries(point, request.disk)
    chains = {entry.name: chain.layers(directory, point, entry.name) for entry in entries}
    if writable_overlay is not None and len(entries) > 1:
        names = ", ".join(entry.name for entry in entries)
        raise UsageError(f"--writable-overlay is for one disk: choose one of {names} with --disk")
    if request.tls is not None and request.tcp is None:
        raise UsageError(
            "--tls needs --tcp; a unix socket needs no TLS, since only you and root can connect to it"
        )
    credentials = tls.read(request.tls) if request.tls is not None else None
    with _listen(request.unix, request.tcp, secured=bool(credentials)) as open_socket, ExitStack() as held:
        shown = [
            held.enter_context(_shown(directory, one, chains[one.name], writable_overlay)) for one in entries
        ]
        with public_server.serve(shown, open_socket, credentials) as server:
            uris = (listen.uri(open_socket, one.name, secured=bool(credentials)) for one in shown)
            ready(
                tuple(
                    Export(entry.name, uri, entry.size, one.writable)
                    for entry, uri, one in zip(entries, uris, shown, strict=True)
                )
            )
            while not stop.requested:
                server.check()
                if filling is not None:
                    filling.check(WriteFailed)
                time.sleep(_CHECK_SECONDS)


def _entries(point: Point, disk: str | None) -> tuple[DiskEntry, ...]:
    if disk is None:
        return point.manifest.disks
    entry = point.manifest.disk(disk)
    if entry is None:
        raise chain.no_such_disk(point, disk)
    return (entry,)


@contextmanager
def _listen(unix: Path | None, tcp: str | None, *, secured: bool) -> Iterator[socket]:
    if unix is not None and tcp is not None:
        raise UsageError("--socket and --tcp are mutually exclusive")
    chosen: AbstractContextManager[socket]
    if tcp is not None:
        chosen = listen.tcp(*listen.tcp_address(tcp, secured=secured))
    elif unix is not None:
        chosen = listen.unix(unix.absolute())
    else:
        with private_dir.directory() as locked:
            # A directory of its own: for the outer one `listen.unix` would wait, since we hold its lock.
            directory = locked / "public"
            directory.mkdir(mode=0o700)
            with listen.unix(directory / "nbd.sock") as found:
                yield found
        return
    with chosen as found:
        yield found


@contextmanager
def _shown(
    directory: VmDirectory, entry: DiskEntry, layers: tuple[Layer, ...], writable_overlay: Path | None
) -> Iterator[ServedImage]:
    """Open everything that QEMU needs to serve a disk."""
    with ExitStack() as held:
        own = None
        if writable_overlay is not None:
            own = held.enter_context(_overlay(directory, writable_overlay, entry, layers))
        opened = held.enter_context(chain.opened(layers))
        if own is None:
            yield ServedImage.read_only(entry.name, opened)
        else:
            yield ServedImage.layered(entry.name, own, opened)


@contextmanager
def _overlay(
    directory: VmDirectory, target: Path, entry: DiskEntry, layers: tuple[Layer, ...]
) -> Iterator[OpenImage]:
    paths = [layer.path for layer in layers]
    with ExitStack() as held:
        try:
            image = held.enter_context(
                overlay.made_or_taken(directory.path.parent, target, entry.size, paths)
            )
        except OSError as err:
            why = f"cannot make {target}: {err.strerror}"
            raise WriteFailed(why, state=UNTOUCHED) from err
        yield image
