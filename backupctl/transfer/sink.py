# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a copy writes to: the seam between `copy` and whatever stores the bytes.

A sink takes writes in any order and never blocks. Each write gives a `Ticket`, which the copy asks until the
write has ended; the content of a write must stay as it is until then.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import nbd

from backupctl.errors import WriteFailed
from backupctl.transfer.extents import Extent
from backupctl.transfer.nbd_client import Connection
from backupctl.transfer.polling import Pollable

ANSWER_SECONDS = 120.0
DISK_SECONDS = 3600.0
"""For a flush that reaches the disk, where every cluster that the kernel held back may cost a seek."""

Ticket = Callable[[], bool]
"""Whether the write has ended. Never blocks; raises WriteFailed if the write failed."""


class Sink(Protocol):
    """What a copy needs of its target. The extents of one copy do not overlap."""

    @property
    def pollables(self) -> Sequence[Pollable]:
        """What becomes ready when a write makes progress."""

    def write(self, extent: Extent, content: memoryview) -> Ticket:
        """Start to write data. Raises WriteFailed."""

    def zero(self, extent: Extent) -> Ticket:
        """Start to write zeroes. Raises WriteFailed."""

    def flush(self, seconds: float) -> None:
        """Wait until all ended writes are on stable storage, at most so long. Raises WriteFailed."""


class NbdSink:
    """A writable NBD export. connections: all to that export; writes take turns on them."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self.connections = tuple(connections)
        self._turns = itertools.cycle(self.connections)

    @property
    def pollables(self) -> Sequence[Pollable]:
        """The connections."""
        return self.connections

    def write(self, extent: Extent, content: memoryview) -> Ticket:
        """Start to write data. Raises WriteFailed."""
        connection = next(self._turns)
        cookie = connection.start_write(nbd.Buffer.from_buffer(content), extent.offset)
        return partial(connection.has_ended, cookie)

    def zero(self, extent: Extent) -> Ticket:
        """Start to write zeroes. Raises WriteFailed."""
        connection = next(self._turns)
        return partial(connection.has_ended, connection.start_zero(extent.length, extent.offset))

    def flush(self, seconds: float) -> None:
        """Have the server write out what it holds. Raises WriteFailed."""
        # It covers the writes of all connections: QEMU promises so (NBD_FLAG_CAN_MULTI_CONN, for writable
        # exports since 7.1). With a server that does not, each connection would need a flush of its own.
        self.connections[0].flush(seconds)


@contextmanager
def open_nbd_sink(
    address: Path,
    export: str,
    connections: int = 2,
    check: Callable[[], None] = lambda: None,
    flush_seconds: float = ANSWER_SECONDS,
) -> Iterator[NbdSink]:
    """Connect to a writable export; when the block ends without an error, everything written is flushed.

    check: called at least every 100 ms of the waits; what it raises ends them. flush_seconds: how long the
    flush may take. Raises WriteFailed.
    """
    opened: list[Connection] = []
    try:
        for _ in range(connections):
            connection = Connection(export, WriteFailed, ANSWER_SECONDS, check)
            opened.append(connection)
            connection.connect(address)
        sink = NbdSink(opened)
        yield sink
        sink.flush(flush_seconds)
    finally:
        for connection in opened:
            connection.close()
