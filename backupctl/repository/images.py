# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of the repository: plain qcow2, made by qemu-img, written and read through QEMU's own server.

The seam: `create_layer` makes an image, `serve` gives the address of an NBD server for it, on a private
unix socket, for as long as the block lasts. Whoever writes speaks NBD and nothing else, so the server
behind it can be exchanged.

No name that is stored in an image is ever opened, and QEMU's tools get no name at all: each file is opened
once (`open_image.py`), checked on its descriptor, and handed over as that. The chain is checked against the
manifests by `chain.py` and given to QEMU link by link.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from backupctl import private
from backupctl.errors import Failed, Locked, RepositoryError, RepositoryUnreadable, WriteFailed
from backupctl.repository import open_image, plain, qemu
from backupctl.repository.open_image import OpenImage

ImageFormat = Literal["qcow2", "raw"]

CLUSTER_BYTES = 65536
EXPORT = "image"

_START_SECONDS, _LAYER_SECONDS = 30.0, 0.5
_SOCKET = "nbd.sock"
_READY = "ready"
# Measured: without these QEMU's server spends most of its time in page faults of its allocator.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


def create_layer(image: Path | OpenImage, size_bytes: int, backing: str | None) -> None:
    """Make an empty qcow2 (version 3, 64 KiB clusters): of an empty file that is open, or a new one.

    backing: the parent's image, relative to the new one, e.g. ``../20261123T041500Z/vda.qcow2``; it is
    written down, not opened. Raises WriteFailed, RepositoryError.
    """
    if isinstance(image, Path):
        with new_layer(image, size_bytes, backing):
            return
    command = ["create", "-q", "-f", "qcow2", "-o", f"compat=1.1,cluster_size={CLUSTER_BYTES}"]
    if backing is not None:
        command += ["-u", "-b", backing, "-F", "qcow2"]
    done = qemu.img([*command, image.name, str(size_bytes)], [image.descriptor])
    if done.returncode:
        raise WriteFailed(f"{image.path} can't be made: {_why(done.stderr, [image])}")


@contextmanager
def new_layer(path: Path, size_bytes: int, backing: str | None) -> Iterator[OpenImage]:
    """Give what `create_layer` made of a new file, open until the block ends. Raises as it does."""
    try:
        made = OpenImage.create(path)
    except OSError as err:
        raise WriteFailed(f"{path} can't be made: {err.strerror}") from err
    with made:
        create_layer(made, size_bytes, backing)
        yield made


def blockdev(chain: Sequence[OpenImage], *, writable: bool = False, in_use: bool = False) -> dict[str, Any]:
    """Return QEMU's options for an image with its whole chain, newest first, link by link.

    They mean these files in a child that inherits their descriptors. Only the newest may be writable. An
    unfinished image may be lost at any time, so flushes to it cost for nothing; it is fsynced once, when it
    is complete. in_use: others read it, so whatever dies it must stay a sound image, and QEMU's flushes are
    real.
    """
    options: dict[str, Any] | None = None
    for image in reversed(chain):
        top = writable and image is chain[0]
        file: dict[str, Any] = {"driver": "file", "filename": image.name}
        if not top:
            file["read-only"] = True
            file["locking"] = "off"  # committed images never change, and may lie on a read-only file system
        options = {"driver": "qcow2", "read-only": not top, "file": file, "backing": options}
        if top:
            options["cache"] = {"no-flush": not in_use}
            options["discard"] = "unmap"
    assert options is not None
    return options


def create_target(
    target: OpenImage, image_format: ImageFormat, size_bytes: int, *, onto_device: bool
) -> None:
    """Prepare what a restore writes to: an image, or a raw file that is one hole.

    Raises WriteFailed, OSError.
    """
    if onto_device:
        return
    if image_format == "qcow2":
        create_layer(target, size_bytes, None)
    else:
        os.ftruncate(target.descriptor, size_bytes)


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
    _complete(target)


def resize(image: OpenImage, size_bytes: int) -> None:
    """Give an image another virtual size, durably; those below it are not looked at.

    Raises Locked, WriteFailed.
    """
    options = blockdev((image,), writable=True, in_use=True)
    command = ["resize", "-q", "--shrink", f"json:{json.dumps(options)}", str(size_bytes)]
    done = qemu.img(command, [image.descriptor])
    if qemu.in_use(done.stderr):
        raise Locked(f"{image.path} is in use, by a VM perhaps")
    if done.returncode:
        raise WriteFailed(f"{image.path} can't be resized: {_why(done.stderr, [image])}")
    _complete(image)


@dataclass(frozen=True)
class Soundness:
    """What `qemu-img check` says of an image's own tables. leaks: clusters that nothing uses, no harm."""

    errors: int
    leaks: int
    said: str


def check(image: OpenImage) -> Soundness:
    """Check a single image's tables, without those below it.

    Raises RepositoryError if qemu-img can't, RepositoryUnreadable if the operating system kept it from that.
    """
    command = ["check", "--output=json", f"json:{json.dumps(blockdev((image,)))}"]
    done = qemu.img(command, [image.descriptor])
    try:
        found = json.loads(done.stdout)
        errors = int(found["check-errors"]) + int(found.get("corruptions", 0))
        return Soundness(errors, int(found.get("leaks", 0)), f"{errors} errors in its tables")
    except (ValueError, KeyError, TypeError):
        if done.returncode < 0:
            raise RepositoryError(
                f"qemu-img check of {image.path} was killed by signal {-done.returncode}"
            ) from None
        if qemu.hindered(done.stderr):
            raise RepositoryUnreadable(f"{image.path} can't be read: {_why(done.stderr, [image])}") from None
        words = open_image.named(done.stderr, [image]).strip().splitlines()
        return Soundness(1, 0, words[-1][:500] if words else "it said nothing")


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
            _complete(opened[0])


def _opened(path: Path, *, writable: bool) -> OpenImage:
    try:
        return OpenImage.open(path, writable=writable)
    except plain.NotThere as err:
        raise RepositoryError(f"{path} can't be opened: {err}") from err


@contextmanager
def served(options: dict[str, Any], *, writable: bool, images: Sequence[OpenImage] = ()) -> Iterator[Path]:
    """Serve what QEMU's options name, as `serve`; bringing it to the disk is left to the caller.

    images: all that the options name by descriptors.
    """
    with private.folder() as folder, _complaints() as complaints:
        server = _start(options, folder, complaints, writable=writable, images=images)
        try:
            await_ready(server, folder / _READY, complaints, images)
            yield folder / _SOCKET
            status = qemu.end(server)
        except BaseException:
            _kill(server)
            raise
        if status is None:
            _kill(server)
            raise WriteFailed(f"QEMU did not complete the image within {qemu.END_SECONDS:g} s")
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


def _complete(image: OpenImage) -> None:
    try:
        image.sync()
    except OSError as err:
        raise WriteFailed(f"{image.path} can't be brought to the disk: {err.strerror}") from err


def _why(complaint: str, images: Sequence[OpenImage]) -> str:
    return open_image.named(complaint, images).strip()[:500]


def _said(complaints: IO[bytes], images: Sequence[OpenImage]) -> str:
    return open_image.named(qemu.said(complaints), images)


def _start(
    image: dict[str, Any], folder: Path, complaints: IO[bytes], *, writable: bool, images: Sequence[OpenImage]
) -> qemu.Child:
    image = {**image, "node-name": "image"}
    server = {"addr": {"type": "unix", "path": str(folder / _SOCKET)}}
    export = {"type": "nbd", "id": EXPORT, "name": EXPORT, "node-name": "image", "writable": writable}
    export["allocation-depth"] = not writable
    command = [
        qemu.server_program(),
        *("--blockdev", json.dumps(image)),
        *("--nbd-server", json.dumps(server)),
        *("--export", json.dumps(export)),
        *("--pidfile", str(folder / _READY)),
    ]
    return qemu.start(
        command, complaints=complaints, environment=ALLOCATOR, descriptors=open_image.descriptors(images)
    )


def await_ready(server: qemu.Child, ready: Path, complaints: IO[bytes], images: Sequence[OpenImage]) -> None:
    """Wait for the process file, written when all is set up: a socket's name is there before it listens.

    images: those that it has to open; 300 in one chain take 15 s. Raises Locked if QEMU finds an image
    in use, RepositoryError if it can't open one (RepositoryUnreadable if the operating system refused that),
    Failed if that can't be told.
    """
    deadline = time.monotonic() + _START_SECONDS + len(images) * _LAYER_SECONDS
    while not ready.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            why = _said(complaints, images)
            if qemu.in_use(why):
                raise Locked(f"an image is in use, by a VM perhaps. QEMU asks: {why}")
            if server.returncode in (None, -signal.SIGKILL):  # too slow, or in the way of something else
                raise Failed(f"QEMU did not come to open the image: {why}")
            said = f"QEMU can't open the image: {why}"
            raise (RepositoryUnreadable if qemu.hindered(why) else RepositoryError)(said)
        time.sleep(0.005)


def _kill(server: qemu.Child) -> None:
    server.kill()
    server.wait()
