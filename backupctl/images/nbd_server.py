# SPDX-License-Identifier: GPL-2.0-or-later
"""A storage daemon that serves an image to ourselves, on a private unix socket.

Readers and writers use NBD only, so the server can be replaced by another.
"""

import json
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from backupctl.errors import Failed, Locked, RepositoryError, RepositoryUnreadable, WriteFailed
from backupctl.images import open_image
from backupctl.images.create import blockdev, complete
from backupctl.images.open_image import OpenImage
from backupctl.system import private_dir, qemu_tools, safe_open

_START_SECONDS, _LAYER_SECONDS = 30.0, 0.5
EXPORT = "image"
_SOCKET = "nbd.sock"
_READY = "ready"
# mallopt(3): without these glibc returns each freed buffer to the kernel, and QEMU's server takes a page
# fault for every page of the next one.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


@contextmanager
def serve(
    chain: Sequence[Path | OpenImage], *, writable: bool = False, in_use: bool = False
) -> Iterator[Path]:
    """Serve an image (with its chain, newest first) over NBD; yields the socket's path.

    A path is opened here, once; a caller that must check an image first opens it itself. The export is
    called `EXPORT`. When the block of a writable image ends, the image is complete and durable; when the
    block raises, it is neither, and must be deleted. in_use: as for `blockdev`; then the image is consistent
    all the time. Raises RepositoryError, WriteFailed.
    """
    with ExitStack() as held:
        opened = [
            held.enter_context(_opened(one, writable=writable and not number))
            if isinstance(one, Path)
            else one
            for number, one in enumerate(chain)
        ]
        options = blockdev(opened, writable=writable, in_use=in_use)
        with served(options, writable=writable, images=opened) as address:
            yield address
        if writable:
            complete(opened[0])


@contextmanager
def served(options: dict[str, Any], *, writable: bool, images: Sequence[OpenImage] = ()) -> Iterator[Path]:
    """Serve what QEMU's options name, like `serve`; the caller makes it durable.

    images: all images that the options name by descriptors.
    """
    with private_dir.directory() as directory, _complaints() as complaints:
        server = _start(options, directory, complaints, writable=writable, images=images)
        try:
            await_ready(server, directory / _READY, complaints, images)
            yield directory / _SOCKET
            status = qemu_tools.end(server)
        except BaseException:
            _kill(server)
            raise
        if status is None:
            _kill(server)
            raise WriteFailed(
                f"qemu-storage-daemon did not close the image within {qemu_tools.END_SECONDS:g} s"
            )
        if status != 0 and writable:
            raise WriteFailed(f"qemu-storage-daemon could not close the image: {_reason(complaints, images)}")


def process_of(address: Path) -> int:
    """Return the process that serves at an address of `served`. Raises Failed, OSError."""
    deadline = time.monotonic() + _START_SECONDS
    while not (number := address.with_name(_READY).read_text(encoding="ascii")).endswith("\n"):
        if time.monotonic() > deadline:  # the file is created an instant before it is written
            raise Failed("qemu-storage-daemon did not write its process id in time")
        time.sleep(0.005)
    return int(number)


def _complaints() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as err:
        raise Failed(f"cannot create a temporary file: {err.strerror}") from err


def _reason(complaints: IO[bytes], images: Sequence[OpenImage]) -> str:
    return open_image.named(qemu_tools.last_message(complaints), images)


def _start(
    image: dict[str, Any],
    directory: Path,
    complaints: IO[bytes],
    *,
    writable: bool,
    images: Sequence[OpenImage],
) -> qemu_tools.Child:
    image = {**image, "node-name": "image"}
    server = {"addr": {"type": "unix", "path": str(directory / _SOCKET)}}
    export = {"type": "nbd", "id": EXPORT, "name": EXPORT, "node-name": "image", "writable": writable}
    export["allocation-depth"] = not writable
    command = [
        qemu_tools.server_program(),
        *("--blockdev", json.dumps(image)),
        *("--nbd-server", json.dumps(server)),
        *("--export", json.dumps(export)),
        *("--pidfile", str(directory / _READY)),
    ]
    return qemu_tools.start(
        command, complaints=complaints, environment=ALLOCATOR, descriptors=open_image.descriptors(images)
    )


def await_ready(
    server: qemu_tools.Child, ready: Path, complaints: IO[bytes], images: Sequence[OpenImage]
) -> None:
    """Wait for the pid file, which is written when all is set up; a socket's name exists before it listens.

    images: those that the server has to open; 300 in one chain take 15 s. Raises Locked if QEMU finds an
    image in use, RepositoryError if it cannot open one (RepositoryUnreadable if the operating system refused
    it), Failed if the server did not start.
    """
    deadline = time.monotonic() + _START_SECONDS + len(images) * _LAYER_SECONDS
    while not ready.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            why = _reason(complaints, images)
            if qemu_tools.in_use(why):
                raise Locked(f"an image is in use, perhaps by a VM: {why}")
            if server.returncode in (None, -signal.SIGKILL):  # too slow, or killed by the OOM killer
                raise Failed(f"qemu-storage-daemon did not start in time: {why}")
            message = f"QEMU cannot open the image: {why}"
            raise (RepositoryUnreadable if qemu_tools.is_os_error(why) else RepositoryError)(message)
        time.sleep(0.005)


def _kill(server: qemu_tools.Child) -> None:
    server.kill()
    server.wait()


def _opened(path: Path, *, writable: bool) -> OpenImage:
    try:
        return OpenImage.open(path, writable=writable)
    except safe_open.NotThere as err:
        raise RepositoryError(f"cannot open {path}: {err}") from err
