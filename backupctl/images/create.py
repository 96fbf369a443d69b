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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backupctl.errors import Locked, RepositoryError, RepositoryUnreadable, WriteFailed
from backupctl.images import open_image
from backupctl.images.open_image import OpenImage
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system import qemu_tools

ImageFormat = Literal["qcow2", "raw"]


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
    done = qemu_tools.img([*command, image.name, str(size_bytes)], [image.descriptor])
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


def resize(image: OpenImage, size_bytes: int) -> None:
    """Give an image another virtual size, durably; those below it are not looked at.

    Raises Locked, WriteFailed.
    """
    options = blockdev((image,), writable=True, in_use=True)
    command = ["resize", "-q", "--shrink", f"json:{json.dumps(options)}", str(size_bytes)]
    done = qemu_tools.img(command, [image.descriptor])
    if qemu_tools.in_use(done.stderr):
        raise Locked(f"{image.path} is in use, by a VM perhaps")
    if done.returncode:
        raise WriteFailed(f"{image.path} can't be resized: {_why(done.stderr, [image])}")
    complete(image)


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
    done = qemu_tools.img(command, [image.descriptor])
    try:
        found = json.loads(done.stdout)
        errors = int(found["check-errors"]) + int(found.get("corruptions", 0))
        return Soundness(errors, int(found.get("leaks", 0)), f"{errors} errors in its tables")
    except (ValueError, KeyError, TypeError):
        if done.returncode < 0:
            raise RepositoryError(
                f"qemu-img check of {image.path} was killed by signal {-done.returncode}"
            ) from None
        if qemu_tools.hindered(done.stderr):
            raise RepositoryUnreadable(f"{image.path} can't be read: {_why(done.stderr, [image])}") from None
        words = open_image.named(done.stderr, [image]).strip().splitlines()
        return Soundness(1, 0, words[-1][:500] if words else "it said nothing")


def complete(image: OpenImage) -> None:
    """Flush an image to stable storage. Raises WriteFailed."""
    try:
        image.sync()
    except OSError as err:
        raise WriteFailed(f"{image.path} can't be brought to the disk: {err.strerror}") from err


def _why(complaint: str, images: Sequence[OpenImage]) -> str:
    return open_image.named(complaint, images).strip()[:500]
