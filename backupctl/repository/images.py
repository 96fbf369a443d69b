# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of the repository: plain qcow2, made by qemu-img, written and read through QEMU's own server.

The seam: `create_layer` makes an image, `serve` gives the address of an NBD server for it, on a private
unix socket, for as long as the block lasts. Whoever writes speaks NBD and nothing else, so the server
behind it can be exchanged.

No name that is stored in an image is ever opened. The chain is checked against the manifests by
`chain.py` and given to QEMU link by link.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from backupctl import private
from backupctl.errors import Failed, Locked, RepositoryError, RepositoryUnreadable, WriteFailed
from backupctl.repository import durable, qemu

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


def create_layer(path: Path, size_bytes: int, backing: str | None) -> None:
    """Make an empty qcow2 (version 3, 64 KiB clusters).

    backing: the parent's image, relative to the new one, e.g. ``../20261123T041500Z/vda.qcow2``; it is
    written down, not opened. Raises WriteFailed.
    """
    command = ["create", "-q", "-f", "qcow2", "-o", f"compat=1.1,cluster_size={CLUSTER_BYTES}"]
    if backing is not None:
        command += ["-u", "-b", backing, "-F", "qcow2"]
    done = qemu.img([*command, f"./{path.name}", str(size_bytes)], cwd=path.parent)
    if done.returncode:
        raise WriteFailed(f"{path} can't be made: {done.stderr.strip():.500}")


def blockdev(chain: Sequence[Path], *, writable: bool = False, in_use: bool = False) -> dict[str, Any]:
    """Return QEMU's options for an image with its whole chain, newest first, link by link.

    Only the newest may be writable. An unfinished image may be lost at any time, so flushes to it cost
    for nothing; it is fsynced once, when it is complete. in_use: others read it, so whatever dies it must
    stay a sound image, and QEMU's flushes are real.
    """
    options: dict[str, Any] | None = None
    for path in reversed(chain):
        top = writable and path == chain[0]
        file: dict[str, Any] = {"driver": "file", "filename": str(path)}
        if not top:
            file["read-only"] = True
            file["locking"] = "off"  # committed images never change, and may lie on a read-only file system
        options = {"driver": "qcow2", "read-only": not top, "file": file, "backing": options}
        if top:
            options["cache"] = {"no-flush": not in_use}
            options["discard"] = "unmap"
    assert options is not None
    return options


def create_target(path: Path, image_format: ImageFormat, size_bytes: int, *, onto_device: bool) -> None:
    """Prepare what a restore writes to: an image, or a raw file that is one hole.

    Raises WriteFailed, OSError.
    """
    if onto_device:
        return
    if image_format == "qcow2":
        create_layer(path, size_bytes, None)
    else:
        os.truncate(path, size_bytes)


@contextmanager
def serve_target(path: Path, image_format: ImageFormat, *, onto_device: bool) -> Iterator[Path]:
    """Serve for writing what `create_target` prepared; otherwise as `serve`."""
    options = blockdev((path,), writable=True)
    if image_format == "raw":
        options["driver"] = "raw"
        del options["backing"]
        options["file"]["driver"] = "host_device" if onto_device else "file"
    with served(options, writable=True) as address:
        yield address
    _complete(path)


def resize(path: Path, size_bytes: int) -> None:
    """Give an image another virtual size, durably; those below it are not looked at.

    Raises Locked, WriteFailed.
    """
    options = blockdev((path,), writable=True, in_use=True)
    done = qemu.img(["resize", "-q", "--shrink", f"json:{json.dumps(options)}", str(size_bytes)])
    if qemu.in_use(done.stderr):
        raise Locked(f"{path} is in use, by a VM perhaps")
    if done.returncode:
        raise WriteFailed(f"{path} can't be resized: {done.stderr.strip():.500}")
    _complete(path)


@dataclass(frozen=True)
class Soundness:
    """What `qemu-img check` says of an image's own tables. leaks: clusters that nothing uses, no harm."""

    errors: int
    leaks: int
    said: str


def check(path: Path) -> Soundness:
    """Check a single image's tables, without those below it.

    Raises RepositoryError if qemu-img can't, RepositoryUnreadable if the operating system kept it from that.
    """
    done = qemu.img(["check", "--output=json", f"json:{json.dumps(blockdev((path,)))}"])
    try:
        found = json.loads(done.stdout)
        errors = int(found["check-errors"]) + int(found.get("corruptions", 0))
        return Soundness(errors, int(found.get("leaks", 0)), f"{errors} errors in its tables")
    except (ValueError, KeyError, TypeError):
        if done.returncode < 0:
            raise RepositoryError(
                f"qemu-img check of {path} was killed by signal {-done.returncode}"
            ) from None
        if qemu.hindered(done.stderr):
            raise RepositoryUnreadable(f"{path} can't be read: {done.stderr.strip():.500}") from None
        words = done.stderr.strip().splitlines()
        return Soundness(1, 0, words[-1][:500] if words else "it said nothing")


@contextmanager
def serve(chain: Sequence[Path], *, writable: bool = False, in_use: bool = False) -> Iterator[Path]:
    """Serve an image (with its chain, newest first) over NBD; yields the socket's path.

    The export is called `EXPORT`. When a writable one ends well, the image is complete and on the disk;
    when the block raises, it is not, and must be thrown away. in_use: as for `blockdev`; then it is a
    sound image all the time. Raises RepositoryError, WriteFailed.
    """
    options = blockdev(chain, writable=writable, in_use=in_use)
    with served(options, writable=writable, layers=len(chain)) as address:
        yield address
    if writable:
        _complete(chain[0])


@contextmanager
def served(options: dict[str, Any], *, writable: bool, layers: int = 1) -> Iterator[Path]:
    """Serve what QEMU's options name, as `serve`; bringing it to the disk is left to the caller.

    layers: how many images QEMU has to open.
    """
    with private.folder() as folder, _complaints() as complaints:
        server = _start(options, folder, complaints, writable=writable)
        try:
            await_ready(server, folder / _READY, complaints, layers)
            yield folder / _SOCKET
            status = qemu.end(server)
        except BaseException:
            _kill(server)
            raise
        if status is None:
            _kill(server)
            raise WriteFailed(f"QEMU did not complete the image within {qemu.END_SECONDS:g} s")
        if status != 0 and writable:
            raise WriteFailed(f"QEMU could not complete the image: {qemu.said(complaints)}")


def _complaints() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as err:
        raise Failed(f"no temporary file can be made: {err.strerror}") from err


def _complete(path: Path) -> None:
    try:
        durable.sync_file(path)
    except OSError as err:
        raise WriteFailed(f"{path} can't be brought to the disk: {err.strerror}") from err


def _start(image: dict[str, Any], folder: Path, complaints: IO[bytes], *, writable: bool) -> qemu.Child:
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
    return qemu.start(command, complaints=complaints, environment=ALLOCATOR)


def await_ready(server: qemu.Child, ready: Path, complaints: IO[bytes], layers: int = 1) -> None:
    """Wait for the process file, written when all is set up: a socket's name is there before it listens.

    layers: how many images it has to open; 300 in one chain take 15 s. Raises Locked if QEMU finds an image
    in use, RepositoryError if it can't open one (RepositoryUnreadable if the operating system refused that),
    Failed if that can't be told.
    """
    deadline = time.monotonic() + _START_SECONDS + layers * _LAYER_SECONDS
    while not ready.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            why = qemu.said(complaints)
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
