# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ends of every copy inside the repository: chains and images opened to be read or written.

Chains are read, and new images written, without a server; a storage daemon writes into what exists. A
writable end is flushed and fsynced when its block ends without an error; otherwise the image must be thrown
away.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from backupctl.images import nbd_server
from backupctl.images.create import ImageFormat
from backupctl.images.layered_image import LayeredImage
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_writer import Qcow2Writer
from backupctl.operations.chain_reader import ChainReader
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.system.threads import side_by_side
from backupctl.targets.raw_writer import RawWriter
from backupctl.transfer import sink
from backupctl.transfer.sink import Sink
from backupctl.transfer.source import Source

CONNECTIONS = 2
"""To each server: a copy keeps `reader.BATCHES` in flight on each, and has as many workers that write."""


@contextmanager
def read_chain(layers: Sequence[Layer]) -> Iterator[ChainReader]:
    """Open a disk at a point. layers: newest first; each image is checked as it is opened.

    Raises DamageFound, RepositoryError.
    """
    with (
        chain.opened(layers) as images,
        LayeredImage(images) as disk,
        ChainReader(disk) as reader,
    ):
        yield reader


@contextmanager
def read_server(address: Path) -> Iterator[Source]:
    """Read from a server of `images.nbd_server`. Raises ReadFailed."""
    with closing(Source.connect([address] * CONNECTIONS, nbd_server.EXPORT)) as source:
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
    """Write a disk of `size` bytes into an empty file or a device; it is durable when the block has ended.

    check: called at least every 100 ms while it is made durable; what it raises ends the wait. Raises
    WriteFailed.
    """
    writer: Qcow2Writer | RawWriter
    if image_format == "qcow2":
        writer = Qcow2Writer(target, size, None)
    else:
        writer = RawWriter(target, size, onto_device=onto_device)
    with writer:
        yield writer
        side_by_side([lambda _go_on: writer.finish()], 1, check)


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
