# SPDX-License-Identifier: GPL-2.0-or-later
"""A point's disks for other programs to read: QEMU's NBD server, on a socket that we listen on.

QEMU would remove whatever is at the path of a unix socket that it is to create, and cannot report which free
port it took. So the socket is made by `system/listen.py` and inherited.
"""

import json
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from backupctl.errors import RepositoryError
from backupctl.images import create, nbd_server, open_image, tls
from backupctl.images.open_image import OpenImage
from backupctl.system import private_dir, qemu_tools

_READY = "ready"


@dataclass(frozen=True)
class ServedImage:
    """One export. options: QEMU's options of the image with its chain. images: all that they name."""

    name: str
    options: dict[str, Any]
    images: Sequence[OpenImage]
    writable: bool

    @classmethod
    def read_only(cls, name: str, chain: Sequence[OpenImage]) -> Self:
        """Export a chain (newest first)."""
        return cls(name, create.blockdev(chain), chain, writable=False)

    @classmethod
    def layered(cls, name: str, overlay: OpenImage, chain: Sequence[OpenImage]) -> Self:
        """Export a writable image of the user on top of a chain (newest first).

        QEMU locks it, so no VM can use it at the same time.
        """
        options = {
            "driver": "qcow2",
            "discard": "unmap",
            "file": {"driver": "file", "filename": overlay.name, "discard": "unmap"},
            "backing": create.blockdev(chain),
        }
        return cls(name, options, (overlay, *chain), writable=True)


@dataclass(frozen=True)
class Server:
    """A running server."""

    child: qemu_tools.Child
    complaints: IO[bytes]

    def check(self) -> None:
        """Raise RepositoryError if it has ended."""
        if self.child.poll() is not None:
            raise RepositoryError(f"qemu-storage-daemon ended: {qemu_tools.last_message(self.complaints)}")


@contextmanager
def serve(
    shown: Sequence[ServedImage], listening: socket.socket, credentials: dict[str, bytes] | None = None
) -> Iterator[Server]:
    """Serve some exports on a listening socket until the block ends. Raises RepositoryError.

    credentials: see `tls.read`; None for a server without TLS.
    """
    every = [image for one in shown for image in one.images]
    with private_dir.directory() as directory, tempfile.TemporaryFile() as complaints:
        secured = [tls.options(credentials, directory / "tls")] if credentials else []
        child = qemu_tools.start(
            _command(shown, listening.fileno(), directory / _READY, secured),
            complaints=complaints,
            environment=nbd_server.ALLOCATOR,
            descriptors=[listening.fileno(), *open_image.descriptors(every)],
        )
        try:
            nbd_server.await_ready(child, directory / _READY, complaints, every)
            yield Server(child, complaints)
            if qemu_tools.end(child) is None:
                raise RepositoryError(f"qemu-storage-daemon did not end within {qemu_tools.END_SECONDS:g} s")
        finally:
            child.kill()
            child.wait()


def _command(
    shown: Sequence[ServedImage], listening: int, ready: Path, secured: Sequence[dict[str, Any]]
) -> list[str]:
    address: dict[str, Any] = {"addr": {"type": "fd", "str": str(listening)}}
    command = [qemu_tools.server_program()]
    for each in secured:
        command += ["--object", json.dumps(each)]
        address["tls-creds"] = each["id"]
    command += ["--nbd-server", json.dumps(address), "--pidfile", str(ready)]
    for number, one in enumerate(shown):
        node = f"disk{number}"  # a disk's own name may be too long for a node, or invalid
        export = {"type": "nbd", "id": node, "name": one.name, "node-name": node, "writable": one.writable}
        command += ["--blockdev", json.dumps({**one.options, "node-name": node})]
        command += ["--export", json.dumps(export)]
    return command
