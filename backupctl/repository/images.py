# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of the repository: plain qcow2, made by qemu-img, written and read through QEMU's own server.

The seam: `create_layer` makes an image, `serve` gives the address of an NBD server for it, on a private
unix socket, for as long as the block lasts. Whoever writes speaks NBD and nothing else, so the server
behind it can be exchanged.

No name that is stored in an image is ever opened. The chain is checked against the manifests by
`chain.py` and given to QEMU link by link.
"""

import ctypes
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backupctl.errors import DamageFound, RepositoryError, WriteFailed
from backupctl.repository import durable

CLUSTER_BYTES = 65536
EXPORT = "image"

_START_SECONDS = 30.0
_STOP_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
# Measured: without these QEMU's server spends most of its time in page faults of its allocator.
_ALLOCATOR = {
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
    done = _qemu_img([*command, f"./{path.name}", str(size_bytes)], cwd=path.parent)
    if done.returncode:
        raise WriteFailed(f"{path} can't be made: {done.stderr.strip():.500}")


def info(path: Path) -> dict[str, Any]:
    """Return what `qemu-img info` says of one image, following no backing link. Raises DamageFound."""
    image = json.dumps(
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    )
    done = _qemu_img(["info", "-U", "--output=json", f"json:{image}"])
    try:
        if done.returncode == 0:
            return dict(json.loads(done.stdout))
    except ValueError:
        pass
    raise DamageFound(f"{path} is no readable qcow2 image: {done.stderr.strip():.500}")


def blockdev(chain: Sequence[Path], *, writable: bool = False) -> dict[str, Any]:
    """Return QEMU's options for an image with its whole chain, newest first, link by link.

    Only the newest may be writable. An unfinished image may be lost at any time, so flushes to it cost
    for nothing; it is fsynced once, when it is complete.
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
            options["cache"] = {"no-flush": True}
            options["discard"] = "unmap"
    assert options is not None
    return options


@contextmanager
def serve(chain: Sequence[Path], *, writable: bool = False) -> Iterator[Path]:
    """Serve an image (with its chain, newest first) over NBD; yields the socket's path.

    The export is called `EXPORT`. When a writable one ends well, the image is complete and on the disk;
    when the block raises, it is not, and must be thrown away. Raises RepositoryError, WriteFailed.
    """
    with tempfile.TemporaryDirectory(prefix="backupctl-image-") as folder:
        address = Path(folder, "nbd.sock")
        with tempfile.TemporaryFile() as complaints:
            server = _start(blockdev(chain, writable=writable), address, complaints, writable=writable)
            try:
                _await_socket(server, address, complaints)
                yield address
                status = _end(server)
            except BaseException:
                server.kill()
                server.wait()
                raise
            if status != 0 and writable:
                raise WriteFailed(f"QEMU could not complete {chain[0]}: {_said(complaints)}")
    if writable:
        try:
            durable.sync_file(chain[0])
        except OSError as err:
            raise WriteFailed(f"{chain[0]} can't be brought to the disk: {err.strerror}") from err


def _start(
    image: dict[str, Any], address: Path, complaints: Any, *, writable: bool
) -> "subprocess.Popen[bytes]":
    image = {**image, "node-name": "image"}
    server = {"addr": {"type": "unix", "path": str(address)}}
    export = {"type": "nbd", "id": EXPORT, "name": EXPORT, "node-name": "image", "writable": writable}
    command = [
        os.environ.get("QEMU_STORAGE_DAEMON", "qemu-storage-daemon"),
        *("--blockdev", json.dumps(image)),
        *("--nbd-server", json.dumps(server)),
        *("--export", json.dumps(export)),
    ]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            env={**os.environ, **_ALLOCATOR},
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, not the child's
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, no lock can be held in it
        )
    except OSError as err:
        raise RepositoryError(f"{command[0]} can't be started: {err.strerror}") from err


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _await_socket(server: "subprocess.Popen[bytes]", address: Path, complaints: Any) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not address.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RepositoryError(f"QEMU can't open the image: {_said(complaints)}")
        time.sleep(0.005)


def _end(server: "subprocess.Popen[bytes]") -> int:
    """End the server with SIGTERM, on which it closes the image properly."""
    server.terminate()
    try:
        return server.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired as err:
        raise WriteFailed(f"QEMU did not complete the image within {_STOP_SECONDS:g} s") from err


def _said(complaints: Any) -> str:
    complaints.seek(0)
    text = complaints.read(2000).decode(errors="replace").strip()
    return text.splitlines()[-1] if text else "it said nothing"


def _qemu_img(arguments: Sequence[str], cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [os.environ.get("QEMU_IMG", "qemu-img"), *arguments]
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise RepositoryError(f"{command[0]} can't be run: {err}") from err
