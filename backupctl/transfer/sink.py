# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a copy writes to: the seam between `copy` and whatever stores the bytes; and the NBD sink.

A sink is written to by several worker threads at once. Each call blocks until its bytes are written, not yet
durably: whoever opened the sink makes them so at the end.
"""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import nbd

from backupctl.digests.clusters import CLUSTER_BYTES, Clusters
from backupctl.errors import WriteFailed
from backupctl.system.threads import END_SECONDS, Stopped
from backupctl.transfer.batch import runs
from backupctl.transfer.nbd_client import Connection

ANSWER_SECONDS = 120.0
DISK_SECONDS = 3600.0
"""For a flush that reaches the disk, where every cluster that the kernel held back may cost a seek."""


class Sink(Protocol):
    """What a copy needs of its target. No cluster is written twice by one copy."""

    def write(self, numbers: Clusters, parts: Sequence[memoryview]) -> None:
        """Write clusters, whose content the parts hold one behind the other. Raises WriteFailed.

        Each part holds whole clusters; a short last cluster of the disk is padded with zeroes.
        """

    def zero(self, numbers: Clusters) -> None:
        """Write zeroes. Raises WriteFailed."""


class NbdSink:
    """A writable NBD export. connections: all to that export, one for each thread that writes at once.

    size: what of the export is written, in bytes; a last cluster that reaches beyond is cut.
    """

    def __init__(self, connections: Sequence[Connection], size: int) -> None:
        self._size = size
        self._first = connections[0]
        self._count = len(connections)
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()
        for connection in connections:
            self._idle.put(connection)
        self._ended = False

    def write(self, numbers: Clusters, parts: Sequence[memoryview]) -> None:
        """Write clusters: all requests of a call are in flight together. Raises WriteFailed."""
        with self._connection() as connection:
            cookies = []
            begin = 0
            for part in parts:
                stop = begin + len(part) // CLUSTER_BYTES
                for first, number, count in runs(numbers[begin:stop]):
                    offset, length = self._bounds(number, count)
                    at = first * CLUSTER_BYTES
                    buffer = nbd.Buffer.from_buffer(part[at : at + length])
                    cookies.append(connection.start_write(buffer, offset))
                begin = stop
            connection.finish(cookies)

    def zero(self, numbers: Clusters) -> None:
        """Write zeroes. Raises WriteFailed."""
        with self._connection() as connection:
            cookies = []
            for _, number, count in runs(numbers):
                offset, length = self._bounds(number, count)
                cookies.append(connection.start_zero(length, offset))
            connection.finish(cookies)

    def flush(self, seconds: float, check: Callable[[], None]) -> None:
        """Have the server bring all ended writes to stable storage. Raises WriteFailed."""
        # It covers the writes of all connections: QEMU promises so (NBD_FLAG_CAN_MULTI_CONN, for writable
        # exports since 7.1). With a server that does not, each connection would need a flush of its own.
        self._first.check = check
        self._first.flush(seconds)

    def close(self) -> None:
        """Close the connections; a thread that still waits on one of them ends its wait first."""
        self._ended = True
        deadline = time.monotonic() + END_SECONDS
        for _ in range(self._count):
            try:
                connection = self._idle.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return  # it hangs; closed under its hands, its descriptor could become that of another file
            connection.close()

    def _bounds(self, number: int, count: int) -> tuple[int, int]:
        """Return offset and length in bytes of a run of clusters."""
        offset = number * CLUSTER_BYTES
        return offset, min(count * CLUSTER_BYTES, self._size - offset)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        connection = self._idle.get()
        try:
            connection.check = self._go_on
            yield connection
        finally:
            self._idle.put(connection)

    def _go_on(self) -> None:
        if self._ended:
            raise Stopped


@contextmanager
def open_nbd_sink(
    address: Path,
    export: str,
    connections: int = 2,
    check: Callable[[], None] = lambda: None,
    flush_seconds: float = ANSWER_SECONDS,
    size: int | None = None,
) -> Iterator[NbdSink]:
    """Connect to a writable export; when the block ends without an error, everything written is flushed.

    check: called at least every 100 ms while this connects and flushes; what it raises ends the wait.
    flush_seconds: how long the flush may take. size: as for NbdSink; None: all of the export. Raises
    WriteFailed.
    """
    opened: list[Connection] = []
    try:
        for _ in range(connections):
            connection = Connection(export, WriteFailed, ANSWER_SECONDS, check)
            opened.append(connection)
            connection.connect(address)
    except BaseException:
        for connection in opened:
            connection.close()
        raise
    sink = NbdSink(opened, opened[0].size() if size is None else size)
    try:
        yield sink
        sink.flush(flush_seconds, check)
    finally:
        sink.close()
