# SPDX-License-Identifier: GPL-2.0-or-later
"""A storage daemon that serves an image to ourselves, on a private unix socket.

Whoever reads or writes speaks NBD and nothing else, so the server behind it can be exchanged.
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
from backupctl.images.create import ImageFormat, blockdev, complete
from backupctl.images.open_image import OpenImage
from backupctl.system import private_dir, qemu_tools, safe_open

_START_SECONDS, _LAYER_SECONDS = 30.0, 0.5
EXPORT = "image"
_SOCKET = "nbd.sock"
_READY = "ready"
# Measured: without these QEMU's server spends most of its time in page faults of its allocator.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


@contextmanager
def serve_target(target: OpenImage, image_format: ImageFormat, *, onto_device: bool) -> Iterator[Path]:
    """Serve for writing what `create_target` prepared; otherwise as `serve`."""
    options = blockdev((target,), writable=True)
    if image_format == "raw":
        options["driver"] = "raw"
        del options["backing"]
        options["file"]["driver"] = "host_device" if onto_device else "file"
    with served(options, writable=True, images=[target]) as address:
        yield address
    complete(target)


@contextmanager
def serve(
    chain: Sequence[Path | OpenImage], *, writable: bool = False, in_use: bool = False
) -> Iterator[Path]:
    """Serve an image (with its chain, newest first) over NBD; yields the socket's path.

    A path is opened here, once; what is to be checked first is opened by who checks it. The export is called
    `EXPORT`. When a writable one ends well, the image is complete and on the disk; when the block raises, it
    is not, and must be thrown away. in_use: as for `blockdev`; then it is a sound image all the time. Raises
    RepositoryError, WriteFailed.
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
    """Serve what QEMU's options name, as `serve`; bringing it to the disk is left to the caller.

    images: all that the options name by descriptors.
    """
    with private_dir.folder() as folder, _complaints() as complaints:
        server = _start(options, folder, complaints, writable=writable, images=images)
        try:
            await_ready(server, folder / _READY, complaints, images)
            yield folder / _SOCKET
            status = qemu_tools.end(server)
        except BaseException:
            _kill(server)
            raise
        if status is None:
            _kill(server)
            raise WriteFailed(f"QEMU did not complete the image within {qemu_tools.END_SECONDS:g} s")
        if status != 0 and writable:
            raise WriteFailed(f"QEMU could not complete the image: {_said(complaints, images)}")


def process_of(address: Path) -> int:
    """Return the process that serves at an address of `served`. Raises Failed, OSError."""
    deadline = time.monotonic() + _START_SECONDS
    while not (number := address.with_name(_READY).read_text(encoding="ascii")).endswith("\n"):
        if time.monotonic() > deadline:  # the file is there a moment before its content is
            raise Failed("QEMU's server did not say which process it is")
        time.sleep(0.005)
    return int(number)


def _complaints() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as err:
        raise Failed(f"no temporary file can be made: {err.strerror}") from err


def _said(complaints: IO[bytes], images: Sequence[OpenImage]) -> str:
    return open_image.named(qemu_tools.said(complaints), images)


def _start(
    image: dict[str, Any], folder: Path, complaints: IO[bytes], *, writable: bool, images: Sequence[OpenImage]
) -> qemu_tools.Child:
    image = {**image, "node-name": "image"}
    server = {"addr": {"type": "unix", "path": str(folder / _SOCKET)}}
    export = {"type": "nbd", "id": EXPORT, "name": EXPORT, "node-name": "image", "writable": writable}
    export["allocation-depth"] = not writable
    command = [
        qemu_tools.server_program(),
        *("--blockdev", json.dumps(image)),
        *("--nbd-server", json.dumps(server)),
        *("--export", json.dumps(export)),
        *("--pidfile", str(folder / _READY)),
    ]
    return qemu_tools.start(
        command, complaints=complaints, environment=ALLOCATOR, descriptors=open_image.descriptors(images)
    )


def await_ready(
    server: qemu_tools.Child, ready: Path, complaints: IO[bytes], images: Sequence[OpenImage]
) -> None:
    """Wait for the process file, written when all is set up: a socket's name is there before it listens.

    images: those that it has to open; 300 in one chain take 15 s. Raises Locked if QEMU finds an image
    in use, RepositoryError if it can't open one (RepositoryUnreadable if the operating system refused that),
    Failed if that can't be told.
    """
    deadline = time.monotonic() + _START_SECONDS + len(images) * _LAYER_SECONDS
    while not ready.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            why = _said(complaints, images)
            if qemu_tools.in_use(why):
                raise Locked(f"an image is in use, by a VM perhaps. QEMU asks: {why}")
            if server.returncode in (None, -signal.SIGKILL):  # too slow, or in the way of something else
                raise Failed(f"QEMU did not come to open the image: {why}")
            said = f"QEMU can't open the image: {why}"
            raise (RepositoryUnreadable if qemu_tools.hindered(why) else RepositoryError)(said)
        time.sleep(0.005)


def _kill(server: qemu_tools.Child) -> None:
    server.kill()
    server.wait()


def _opened(path: Path, *, writable: bool) -> OpenImage:
    try:
        return OpenImage.open(path, writable=writable)
    except safe_open.NotThere as err:
        raise RepositoryError(f"{path} can't be opened: {err}") from err
