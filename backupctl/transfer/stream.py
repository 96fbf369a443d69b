# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole disk as one stream of bytes, in order: for pipes.

::

    extents ─► pieces ─► [reads in flight, at most `DEPTH`] ─► written strictly in order
"""

import errno
import os
import select
import stat
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import nbd

from backupctl.errors import WriteFailed
from backupctl.transfer import cluster_map, extents
from backupctl.transfer.extents import Extent
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.source import Source

PIECE_BYTES = 1 << 20
DEPTH = 8
WATCH_SECONDS = 0.1
_ZEROES = memoryview(bytes(PIECE_BYTES))


@dataclass
class _Piece:
    """A range on its way; no buffer: it is zeroes."""

    extent: Extent
    connection: Connection
    buffer: "nbd.Buffer | None" = None
    cookie: int = 0

    def content(self) -> memoryview:
        """Wait for the bytes. Raises ReadFailed."""
        if self.buffer is None:
            return _ZEROES[: self.extent.length]
        self.connection.wait(lambda: self.connection.completed(self.cookie))
        return memoryview(self.buffer.to_bytearray())


def stream(
    source: Source,
    descriptor: int,
    *,
    check: Callable[[], None],
    progress: Callable[[int], None],
    look: Callable[[Extent, memoryview | None], object] = lambda _extent, _content: None,
) -> None:
    """Write all of `source` to a descriptor.

    look: shown each piece before any byte of it is written (no content: zeroes); what it raises ends it.
    check: called at least every 100 ms while nobody takes the bytes; what it raises ends the stream.
    progress: told the bytes done. Raises ReadFailed, WriteFailed.
    """
    pieces = _pieces(source)
    flying: deque[_Piece] = deque()
    done = 0
    with _outlet(descriptor) as write:
        while True:
            while len(flying) < DEPTH and (extent := next(pieces, None)) is not None:
                flying.append(_start(extent, source.connections[0]))
            if not flying:
                return
            piece = flying.popleft()
            content = piece.content()
            look(piece.extent, content if piece.buffer is not None else None)
            _write_all(write, content, check)
            done += piece.extent.length
            check()
            progress(done)


def _start(extent: Extent, connection: Connection) -> _Piece:
    piece = _Piece(extent, connection)
    if not extent.zero:
        piece.buffer = nbd.Buffer(extent.length)
        piece.cookie = connection.start_read(piece.buffer, extent.offset)
    return piece


def _pieces(source: Source) -> Iterator[Extent]:
    for extent in cluster_map.all_extents(source):
        yield from extents.pieces(extent, PIECE_BYTES)


@contextmanager
def _outlet(descriptor: int) -> Iterator[Callable[[memoryview], int]]:
    """Give a function that writes what it can and never waits for long.

    A pipe whose reader sleeps would hold us in `write`, deaf to a request to stop. So it is opened anew
    without blocking: setting that on the descriptor itself would also change it for whoever shares it.
    What is a file or a disk is brought to the disk at the end: a late error must not be lost.
    """
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISFIFO(mode):
        yield partial(os.write, descriptor)
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            _sync(descriptor)
        return
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield partial(_write_some, own)
    finally:
        os.close(own)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as err:
        raise WriteFailed(f"the output can't be brought to the disk: {err.strerror}") from err


def _write_some(descriptor: int, content: memoryview) -> int:
    try:
        return os.write(descriptor, content)
    except BlockingIOError:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLOUT)
        waiting.poll(WATCH_SECONDS * 1000)
        return 0


def _write_all(write: Callable[[memoryview], int], content: memoryview, check: Callable[[], None]) -> None:
    while content:
        try:
            written = write(content)
        except OSError as err:
            why = "its reader went away" if err.errno == errno.EPIPE else err.strerror
            raise WriteFailed(f"the image can't be written to the output: {why}") from err
        content = content[written:]
        if not written:
            check()
