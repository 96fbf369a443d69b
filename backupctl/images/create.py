# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that qemu-img creates or resizes, and how QEMU's tools open one of ours with its chain.

A backup and a restore write their images themselves (`qcow2_writer.py`), and chains are read without QEMU
(`layered_image.py`). What is merged, changed in place or served to others goes through QEMU, with images from
here: `nbd_server.serve` serves them over NBD, on a private unix socket, for as long as a block lasts.

No file name that is stored in an image is ever opened, and QEMU's tools get no names at all: each file is
opened once (`open_image.py`), checked by its descriptor, and handed over as that descriptor. The repository
checks the chain against the manifests (`chain.py`) and gives it to QEMU link by link.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from backupctl.errors import Locked, WriteFailed
from backupctl.images import open_image
from backupctl.images.open_image import OpenImage
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system import qemu_tools

ImageFormat = Literal["qcow2", "raw"]


def create_layer(image: Path | OpenImage, size_bytes: int, backing: str | None) -> None:
    """Make an empty qcow2 image (version 3, 64 KiB clusters), in an open empty file or in a new one.

    backing: the parent's image, relative to the new one, e.g. ``../20261123T041500Z/vda.qcow2``; it is
    written down, not opened. Raises WriteFailed, RepositoryError.
    """
    if isinstance(image, Path):
        with new_layer(image, size_bytes, backing):
            return
    command = ["create", "-q", "-f", "qcow2", "-o", f"compat=1.1,cluster_size={CLUSTER_BYTES}"]
    if backing is not None:
        command += ["-u", "-b", backing, "-F", "qcow2"]
    done = qemu_tools.img([*command, image.name, str(size_bytes)], [image.descriptor])
    if done.returncode:
        raise WriteFailed(_why(done.stderr, [image]), subject=f"cannot create {image.path}")


@contextmanager
def new_layer(path: Path, size_bytes: int, backing: str | None) -> Iterator[OpenImage]:
    """Create a file with an empty layer, open until the block ends. Raises as `create_layer`."""
    with new_file(path) as made:
        create_layer(made, size_bytes, backing)
        yield made


@contextmanager
def new_file(path: Path) -> Iterator[OpenImage]:
    """Create an empty file, open until the block ends. Raises WriteFailed."""
    try:
        made = OpenImage.create(path)
    except OSError as err:
        raise WriteFailed(str(err.strerror), subject=f"cannot create {path}") from err
    with made:
        yield made


def blockdev(chain: Sequence[OpenImage], *, writable: bool = False, in_use: bool = False) -> dict[str, Any]:
    """Return QEMU's options for an image with its whole chain, newest first, link by link.

    They are valid in a child that inherits the descriptors. Only the newest may be writable. Flushes of an
    unfinished image are skipped, because a crash drops it anyway; it is fsynced once, when it is complete.
    in_use: others read the image, so it must be consistent after any crash, and QEMU's flushes are real.
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


def resize(image: OpenImage, size_bytes: int) -> None:
    """Change the virtual size of an image, durably, without opening those below it.

    Raises Locked, WriteFailed.
    """
    options = blockdev((image,), writable=True, in_use=True)
    command = ["resize", "-q", "--shrink", f"json:{json.dumps(options)}", str(size_bytes)]
    done = qemu_tools.img(command, [image.descriptor])
    if qemu_tools.in_use(done.stderr):
        raise Locked(f"{image.path} is in use, perhaps by a VM")
    if done.returncode:
        raise WriteFailed(_why(done.stderr, [image]), subject=f"cannot resize {image.path}")
    complete(image)


def complete(image: OpenImage) -> None:
    """Flush an image to stable storage. Raises WriteFailed."""
    try:
        image.sync()
    except OSError as err:
        raise WriteFailed(str(err.strerror), subject=f"cannot sync {image.path}") from err


def _why(complaint: str, images: Sequence[OpenImage]) -> str:
    return open_image.named(complaint, images).strip()[:500]
