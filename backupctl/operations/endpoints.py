# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ends of every copy inside the repository: chains and images opened to be read or written.

Each is a context manager that starts a storage daemon for the images and connects to it. A writable end is
flushed and fsynced when its block ends without an error; otherwise the image must be thrown away.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from backupctl.images import nbd_server
from backupctl.images.create import ImageFormat
from backupctl.images.open_image import OpenImage
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.transfer import sink
from backupctl.transfer.sink import Sink
from backupctl.transfer.source import Source

CONNECTIONS = 2
"""To each server: a copy keeps `reader.BATCHES` in flight on each, and has as many workers that write."""


@contextmanager
def read_chain(layers: Sequence[Layer], *, tolerate_errors: bool = False) -> Iterator[Source]:
    """Open a disk at a point. layers: newest first; each image is checked as it is opened.

    tolerate_errors: as for `Source.connect`. Raises DamageFound, ReadFailed, RepositoryError.
    """
    with (
        chain.opened(layers) as opened,
        read_images(opened, tolerate_errors=tolerate_errors) as source,
    ):
        yield source


@contextmanager
def read_images(
    images: Sequence[OpenImage], *, depth: bool = False, tolerate_errors: bool = False
) -> Iterator[Source]:
    """Open images of one chain, newest first, without what is below them.

    depth, tolerate_errors: as for `Source.connect`. Raises ReadFailed, RepositoryError.
    """
    with (
        nbd_server.serve(images) as address,
        read_server(address, depth=depth, tolerate_errors=tolerate_errors) as source,
    ):
        yield source


@contextmanager
def read_server(address: Path, *, depth: bool = False, tolerate_errors: bool = False) -> Iterator[Source]:
    """Read from a server of `images.nbd_server`. Raises ReadFailed."""
    addresses = [address] * CONNECTIONS
    with closing(
        Source.connect(addresses, nbd_server.EXPORT, depth=depth, tolerate_errors=tolerate_errors)
    ) as source:
        yield source


@contextmanager
def write_images(
    images: Sequence[OpenImage],
    check: Callable[[], None],
    *,
    in_use: bool = False,
    flush_seconds: float = sink.ANSWER_SECONDS,
) -> Iterator[Sink]:
    """Write into the first of the images of a chain, newest first.

    check: called at least every 100 ms of the waits; what it raises ends them. in_use: as for
    `nbd_server.serve`. Raises RepositoryError, WriteFailed.
    """
    with (
        nbd_server.serve(images, writable=True, in_use=in_use) as address,
        write_server(address, check, flush_seconds=flush_seconds) as opened,
    ):
        yield opened


@contextmanager
def write_target(
    target: OpenImage,
    image_format: ImageFormat,
    size: int,
    check: Callable[[], None],
    *,
    onto_device: bool,
) -> Iterator[Sink]:
    """Write into what `images.create.create_target` has prepared. size: of the disk, in bytes.

    check: as for `write_images`.
    """
    with (
        nbd_server.serve_target(target, image_format, onto_device=onto_device) as address,
        write_server(address, check, size=size) as opened,
    ):
        yield opened


@contextmanager
def write_server(
    address: Path,
    check: Callable[[], None],
    *,
    flush_seconds: float = sink.ANSWER_SECONDS,
    size: int | None = None,
) -> Iterator[Sink]:
    """Write to a server of `images.nbd_server`. check: as for `write_images`. size: as for `NbdSink`.

    Raises WriteFailed.
    """
    with sink.open_nbd_sink(address, nbd_server.EXPORT, CONNECTIONS, check, flush_seconds, size) as opened:
        yield opened
