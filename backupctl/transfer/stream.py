# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole disk as one stream of bytes, in order: for pipes.

::

    extents ─► chunks ─► [reads in flight, at most `DEPTH`] ─► written strictly in order
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

CHUNK_BYTES = 1 << 20
DEPTH = 8
CHECK_SECONDS = 0.1
_ZEROES = memoryview(bytes(CHUNK_BYTES))


@dataclass
class _Chunk:
    """A range under way; buffer: None if it is zeroes."""

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
    on_chunk: Callable[[Extent, memoryview | None], object] = lambda _extent, _content: None,
) -> None:
    """Write all of `source` to a descriptor.

    on_chunk: called with each chunk before any byte of it is written (no content: zeroes); what it raises
    ends the stream. check: called at least every 100 ms while the reader takes no bytes; what it raises ends
    the stream. progress: called with the bytes done. Raises ReadFailed, WriteFailed.
    """
    chunks = _chunks(source)
    in_flight: deque[_Chunk] = deque()
    done = 0
    with _outlet(descriptor) as write:
        while True:
            while len(in_flight) < DEPTH and (extent := next(chunks, None)) is not None:
                in_flight.append(_start(extent, source.connections[0]))
            if not in_flight:
                return
            chunk = in_flight.popleft()
            content = chunk.content()
            on_chunk(chunk.extent, content if chunk.buffer is not None else None)
            _write_all(write, content, check)
            done += chunk.extent.length
            check()
            progress(done)


def _start(extent: Extent, connection: Connection) -> _Chunk:
    chunk = _Chunk(extent, connection)
    if not extent.zero:
        chunk.buffer = nbd.Buffer(extent.length)
        chunk.cookie = connection.start_read(chunk.buffer, extent.offset)
    return chunk


def _chunks(source: Source) -> Iterator[Extent]:
    for extent in cluster_map.all_extents(source):
        yield from extents.split(extent, CHUNK_BYTES)


@contextmanager
def _outlet(descriptor: int) -> Iterator[Callable[[memoryview], int]]:
    """Yield a function that writes what it can and returns within `CHECK_SECONDS`.

    A pipe whose reader sleeps would block us in `write`, so that we could not react to a request to stop. So
    the pipe is opened once more with O_NONBLOCK: set on the descriptor itself, the flag would also change for
    every process that shares it. A file or block device is fsynced at the end, or a late write error would be
    lost.
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
        raise WriteFailed(f"cannot sync the output: {err.strerror}") from err


def _write_some(descriptor: int, content: memoryview) -> int:
    try:
        return os.write(descriptor, content)
    except BlockingIOError:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLOUT)
        waiting.poll(CHECK_SECONDS * 1000)
        return 0


def _write_all(write: Callable[[memoryview], int], content: memoryview, check: Callable[[], None]) -> None:
    while content:
        try:
            written = write(content)
        except OSError as err:
            why = "the reader closed it" if err.errno == errno.EPIPE else err.strerror
            raise WriteFailed(f"cannot write the image to the output: {why}") from err
        content = content[written:]
        if not written:
            check()
